"""The steps, meshes and presets that fidelity, quality and the end-to-end tests have in common."""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from autopar.api import ParallelStep, parallelize
from autopar.cluster import Cluster, Mesh
from autopar.cost import RooflineCost, hardware
from autopar.ir.arguments import adapt
from autopar.lowering.audit import Audit, Difference, audit, compare
from autopar.lowering.predict import flops
from autopar.plan import Plan

Settings = dict[str, Any]
"""What a model's ``make`` takes."""

TEXT: Settings = {"layers": 2, "width": 64, "heads": 8, "vocab": 128, "seq": 32, "batch": 16}
IMAGE: Settings = {"layers": 2, "width": 64, "heads": 8, "image": 16, "batch": 16}


def of_models(text: Settings, mlp: Settings, image: Settings, resnet: Settings) -> dict[str, Settings]:
    """The settings of every model: ``text`` for the language models, ``image`` for vit."""
    language = dict.fromkeys(("gpt", "gpt_nnx", "bert", "llama"), text)
    return {"mlp": mlp, **language, "vit": image, "moe": {**text, "experts": 8}, "wide_resnet": resnet}


TINY = of_models(
    TEXT, {"layers": 2, "width": 64, "batch": 16}, IMAGE, {"layers": 1, "width": 16, "image": 8, "batch": 16}
)
"""Settings that compile in seconds; every model has dropout (llama has none by design)."""

WIDE_TEXT: Settings = {"layers": 2, "width": 512, "heads": 8, "vocab": 2048, "seq": 256, "batch": 32}
WIDE = of_models(
    WIDE_TEXT,
    {"layers": 4, "width": 2048, "batch": 512},
    {"layers": 2, "width": 512, "heads": 8, "image": 64, "batch": 64},
    {"layers": 1, "width": 128, "image": 32, "batch": 64},
)
"""Settings whose products outweigh the rest, as those of real steps do."""

SIZES = {"tiny": TINY, "wide": WIDE}

MESHES = ("data=8", "data=2,tensor=4", "a=2,b=2,c=2")
PRESETS = ("dp", "zero1", "zero2", "zero3", "megatron", "megatron_sp", "tp2d", "gshard")

RANDOM = ("random_bits", "threefry2x32")

O0 = {"xla_backend_optimization_level": 0}
"""Compiles fast; the passes that touch collectives run all the same."""


@dataclass(frozen=True)
class Case:
    """One model on one mesh under one preset ("" for none)."""

    model: str
    mesh: str
    preset: str = ""

    def __str__(self) -> str:
        return f"{self.model}-{self.mesh}-{self.preset or 'unrestricted'}"


def cases() -> Iterator[Case]:
    """Every case that makes sense: tp2d needs two axes, gshard experts."""
    for model in TINY:
        for mesh in MESHES:
            for preset in ("", *PRESETS):
                if (preset != "gshard" or model == "moe") and (preset != "tp2d" or "," in mesh):
                    yield Case(model, mesh, preset)


def slow_cluster() -> Cluster:
    """Devices so slow that sharding a tiny step pays: their plans look like those of large steps."""
    cluster = hardware("v5e")
    device = replace(cluster.device, peak_flops=(("float32", 1e9),), memory_Bps=1e8)
    return replace(cluster, device=device, link=replace(cluster.link, alpha_s=1e-7))


def slow_device(mesh: str) -> RooflineCost:
    """Prices on a mesh of slow devices."""
    return RooflineCost(slow_cluster(), Mesh.parse(mesh))


def make(model: str, **settings: Any) -> Any:
    """(step, state, batch) of a model."""
    return importlib.import_module(f"models.{model}").make(**settings)


def losses(run: Callable[[Any], Any], arguments: tuple[Any, ...], steps: int) -> list[float]:
    """The loss of each of ``steps`` steps; ``run`` takes a pure step's arguments and gives its result."""
    found = []
    state, *batch = arguments
    for _ in range(steps):
        state, metrics = run((state, *batch))
        found.append(float(metrics["loss"]))
    return found


@functools.cache
def reference_losses(model: str, steps: int, size: str = "tiny") -> tuple[float, ...]:
    """The losses of ``jax.jit(step)`` on one device."""
    if not steps:
        return ()
    step, *arguments = make(model, **SIZES[size][model])
    pure = adapt(step, arguments)
    compiled = jax.jit(pure.function, compiler_options=O0)
    return tuple(losses(lambda args: compiled(*args), pure.arguments, steps))


class Built:
    """A case planned, lowered and compiled once, for running and for audit."""

    def __init__(self, case: Case, cost: RooflineCost | None = None, size: str = "tiny") -> None:
        step, *arguments = make(case.model, **SIZES[size][case.model])
        self.arguments = adapt(step, arguments).arguments
        parallel: ParallelStep = parallelize(step, cost=cost or slow_device(case.mesh), preset=case.preset)
        self.compiled = parallel.compiled(*arguments)
        self.plan: Plan = self.compiled.plan
        inputs = self.compiled.traced.program.inputs
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs]
        self.executable = self.compiled.function.lower(*shapes).compile(compiler_options=O0)

    def run(self, arguments: tuple[Any, ...]) -> Any:
        """One step, as a pure function."""
        placed = self.compiled.place(jax.tree.leaves(arguments))
        results = self.executable(*placed, *self.compiled.constants)
        return jax.tree.unflatten(self.compiled.traced.out_tree, results)

    def losses(self, steps: int) -> list[float]:
        """The loss of each step."""
        return losses(self.run, self.arguments, steps)

    def audit(self) -> Audit:
        """What the compiler built."""
        return audit(self.executable, self.plan.mesh)

    def flops_ratios(self) -> tuple[float, float]:
        """XLA's FLOPs over predicted ones: without random bits, and of matrix products and convolutions alone."""
        audited, local = self.audit(), self.compiled.local
        random, products = flops(local, RANDOM), flops(local, ("dot_general", "conv_general_dilated"))
        others = (audited.flops - audited.random_flops) / (self.plan.prediction.flops - random)
        return others, audited.product_flops / products

    def differences(self) -> tuple[Difference, ...]:
        """Where compiled collectives are not the predicted ones."""
        return compare(self.plan.prediction.collectives, self.audit(), self.plan.mesh)
