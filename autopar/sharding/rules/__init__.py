"""The rules of JAX's primitives, one module per family; importing this package fills the two tables."""

from autopar.sharding.rules import contraction as contraction
from autopar.sharding.rules import control as control
from autopar.sharding.rules import conv as conv
from autopar.sharding.rules import elementwise as elementwise
from autopar.sharding.rules import indexing as indexing
from autopar.sharding.rules import linalg as linalg
from autopar.sharding.rules import pipeline as pipeline
from autopar.sharding.rules import random as random
from autopar.sharding.rules import reduction as reduction
from autopar.sharding.rules import shape as shape
