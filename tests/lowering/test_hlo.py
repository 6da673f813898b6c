"""The text of compiled modules: device groups in every notation, collectives as GPUs and TPUs write them, cycles."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster import Mesh
from autopar.lowering import hlo, hlo_work
from autopar.lowering.audit import axes_spanned

MESH = Mesh.parse("data=2,tensor=4")
BOTH = ("data", "tensor")
K = 16 * 16 * 4  # bytes of float32 (16, 16)


@given(st.permutations(range(3)), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 3))
def test_iota_groups_are_the_reshaped_transposed_iota_of_numpy(order, dims, cut):
    shape = [math.prod(dims[order[k]] for k in range(cut)), math.prod(dims[order[k]] for k in range(cut, 3))]
    text = f"[{','.join(map(str, shape))}]<=[{','.join(map(str, dims))}]T({','.join(map(str, order))})"
    expected = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    assert np.array_equal(np.array(hlo.groups_of(text)), expected)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_the_groups_of_a_set_of_axes_span_exactly_its_axes_of_size_above_one(sizes, data):
    mesh = Mesh(tuple((f"a{k}", size) for k, size in enumerate(sizes)))
    inside = [data.draw(st.booleans()) for _ in sizes]
    order = [k for k, chosen in enumerate(inside) if not chosen] + [k for k, c in enumerate(inside) if c]
    width = math.prod(size for size, chosen in zip(sizes, inside, strict=True) if chosen)
    grid = np.arange(mesh.n_devices).reshape(sizes).transpose(order).reshape(-1, width)
    groups = tuple(tuple(row) for row in grid.tolist())
    expected = tuple(f"a{k}" for k, size in enumerate(sizes) if inside[k] and size > 1)
    assert axes_spanned(groups, mesh) == expected


# Lines of a module for GPUs: asynchronous forms, tuples, iota groups; each beside what it means.
GPU_MODULE = """HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[16,16]) -> f32[4,16] {
  %p = f32[16,16]{1,0} parameter(0)
  ROOT %rs = f32[4,16]{1,0} reduce-scatter(%p), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (x: f32[16,16], y: bf16[8,4]) -> f32[16,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %y = bf16[8,4]{1,0} parameter(1)
"""
GPU_LINES = {
    "all_reduce started": (
        "%s = f32[16,16]{1,0} all-reduce-start(%x), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add",
        ("all_reduce", ("data",), K, 1, "float32"),
    ),
    "all_gather started": (
        "%s = ((f32[16,16]), f32[64,16]) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
        ("all_gather", ("tensor",), 4 * K, 1, "float32"),
    ),
    "all_reduce combined": (
        "%s = (f32[16,16], /*index=1*/f32[16,16]) all-reduce(%x, %x), replica_groups={}, to_apply=%add",
        ("all_reduce", BOTH, 2 * K, 2, "float32"),
    ),
    "reduce_scatter in a wrapper": (
        "%s = ((f32[16,16]), f32[4,16], u32[]) async-start(%x), calls=%wrapped",
        ("reduce_scatter", ("tensor",), K, 1, "float32"),
    ),
    "permute started": (
        "%s = (bf16[8,4], bf16[8,4]) collective-permute-start(%y), source_target_pairs={{0,4},{1,5},{4,0}}",
        ("collective_permute", ("data",), 64, 1, "bfloat16"),
    ),
    "exchange of one array": (
        "%s = bf16[8,4] all-to-all(%y), replica_groups=[1,8]<=[8], dimensions={0}",
        ("all_to_all", BOTH, 64, 1, "bfloat16"),
    ),
}


def gpu_module(line: str) -> hlo.Module:
    done = "  %done = f32[16,16] all-reduce-done(%s)\n  ROOT %r = f32[16,16] copy(%done)\n}\n"
    return hlo.parse(f"{GPU_MODULE}  {line}\n{done}")


@pytest.mark.parametrize("name", GPU_LINES)
def test_the_forms_that_the_gpu_compiler_writes(name):
    line, (kind, axes, nbytes, count, dtype) = GPU_LINES[name]
    found = list(hlo.communications(gpu_module(line), 8))
    assert {(c.kind, axes_spanned(c.groups, MESH), c.dtype) for c in found} == {(kind, axes, dtype)}
    assert (sum(c.nbytes for c in found), len(found)) == (nbytes, count)


def test_groups_of_one_device_communicate_nothing():
    alone = ",".join(f"{{{device}}}" for device in range(8))
    line = f"%s = f32[16,16] all-reduce(%x), replica_groups={{{alone}}}, to_apply=%add"
    assert not list(hlo.communications(gpu_module(line), 8))


# The TPU compiler writes a fused reduce-scatter as an all-reduce of padded rows, and no trip counts.
TPU_MODULE = """HloModule step, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (input: bf16[4096,1024]) -> bf16[1032,1024] {
  %input = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[4128,1024]{1,0:T(8,128)(2,1)} pad(%input, %zero), padding=0_32x0_0
  %ar = bf16[4128,1024]{1,0:T(8,128)(2,1)} all-reduce(%pad), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = bf16[1032,1024]{1,0:T(8,128)(2,1)} dynamic-slice(%ar, %zero), dynamic_slice_sizes={1032,1024}
}

%body (state: (s32[], bf16[4096,1024])) -> (s32[], bf16[4096,1024]) {
  %state = (s32[]{:T(128)}, bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %value = bf16[4096,1024]{1,0} get-tuple-element(%state), index=1
  %fusion = bf16[1032,1024]{1,0} fusion(%value), kind=kCustom, calls=%all-reduce-scatter.1
  %work = bf16[8]{0} fusion(%value), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1000"}
  ROOT %next = (s32[], bf16[4096,1024]) tuple(%state, %value)
}

%f (p: bf16[4096,1024]) -> bf16[8] {
  %p = bf16[4096,1024]{1,0} parameter(0)
  ROOT %s = bf16[8]{0} slice(%p), slice={[0:8]}
}

%condition (state: (s32[], bf16[4096,1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %state = (s32[]{:T(128)}, bf16[4096,1024]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

ENTRY %main (x: bf16[4096,1024]) -> bf16[4096,1024] {
  %x = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %first = s32[]{:T(128)} constant(2)
  %copy = s32[]{:T(128)} copy(%first)
  %start = (s32[]{:T(128)}, bf16[4096,1024]{1,0}) tuple(%copy, %x)
  %loop = (s32[], bf16[4096,1024]) while(%start), condition=%condition, body=%body
  %once = bf16[8]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"7"}
  %unknown = bf16[8]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %out = bf16[4096,1024]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_fused_reduce_scatter_of_the_tpu_is_unpadded_and_its_loop_counted():
    module = hlo.parse(TPU_MODULE)
    found = list(hlo.communications(module, 8))
    assert [(c.kind, c.nbytes, c.times, c.dtype) for c in found] == [
        ("reduce_scatter", 4096 * 1024 * 2, 10, "bfloat16")
    ]
    assert hlo_work.estimated_cycles(module) == 10 * 1000 + 7  # the largest int64 is no estimate


def test_a_module_without_an_estimate_has_none():
    assert hlo_work.estimated_cycles(hlo.parse(ASYNC_MODULE)) is None


# A collective that the TPU overlaps with a product: written into the start, the product and the done.
ASYNC_MODULE = """HloModule step, is_scheduled=true, num_partitions=8

%start (p: f32[16,16]) -> (f32[16,16], f32[64,16]) {
  %p = f32[16,16]{1,0} parameter(0)
  %g = f32[64,16]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
  ROOT %c = (f32[16,16], f32[64,16]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: f32[16,16]) -> f32[64,16] {
  %q = f32[16,16]{1,0} parameter(0)
  ROOT %h = f32[64,16]{1,0} all-gather(%q), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%done (r: f32[16,16]) -> f32[64,16] {
  %r = f32[16,16]{1,0} parameter(0)
  %i = f32[64,16]{1,0} all-gather(%r), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
  ROOT %d = f32[64,16]{1,0} custom-call(%r, %i), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[16,16]) -> f32[64,16] {
  %x = f32[16,16]{1,0} parameter(0)
  %s = (f32[16,16], f32[64,16]) fusion(%x), kind=kCustom, calls=%start
  %y = f32[16,16]{1,0} get-tuple-element(%s), index=0
  %z = f32[64,16]{1,0} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %w = f32[64,16]{1,0} fusion(%y), kind=kCustom, calls=%done
}
"""


def test_a_collective_that_the_tpu_spreads_over_fusions_counts_once():
    found = list(hlo.communications(hlo.parse(ASYNC_MODULE), 8))
    assert [(c.kind, c.nbytes, c.times) for c in found] == [("all_gather", 4 * K, 1)]


def test_unbalanced_text_is_refused():
    with pytest.raises(ValueError, match="unbalanced parentheses"):
        hlo.parse("ENTRY %main () -> f32[] {\n  %x = (f32[], f32[] tuple(\n}\n")


# Lines that the TPU compiler writes for x @ w and for the batched products of attention, and their flops.
PRODUCTS = {
    "a product": ("f32[2,128,64]", "f32[64,32,1]", "f32[2,128,32]", "window={size=1}, dim_labels=0bf_io0->0bf", 2**20),
    "heads, by padding": (
        "f32[2,128,64,1]",
        "f32[64,8,32,1]",
        "f32[2,128,8,32]",
        "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
        2 * 2 * 128 * 8 * 32 * 64,
    ),
    "heads, by dilation": (
        "f32[2,128,8,32]",
        "f32[2,128,8,32]",
        "f32[2,8,128,128]",
        "window={size=2x8 stride=1x7 lhs_dilate=2x8}, dim_labels=0b1f_0o1i->01bf",
        2 * 2 * 8 * 128 * 128 * 32,
    ),
    "an image": (
        "f32[1,16,16,4]",
        "f32[3,3,4,8]",
        "f32[1,16,16,8]",
        "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
        2 * 46 * 46 * 4 * 8,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_convolutions_count_the_products_that_meet_no_padding(name):
    left, right, out, attributes, flops = PRODUCTS[name]
    text = f"""HloModule step

ENTRY %main (x: {left}, y: {right}) -> {out} {{
  %x = {left} parameter(0)
  %y = {right} parameter(1)
  ROOT %product = {out} convolution(%x, %y), {attributes}
}}
"""
    assert list(hlo_work.products(hlo.parse(text))) == [(flops, 1)]
