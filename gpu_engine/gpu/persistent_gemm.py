"""Persistent kernels of large matrix products, for Hopper and later: a program for each multiprocessor, which walks
over tiles and loads their factors through tensor descriptors.

A descriptor says where a matrix lies; with it one instruction (TMA) copies a block of the matrix to shared memory, and
what lies outside the matrix arrives as zeros. Programs make their descriptors themselves, in global scratch, from the
arguments that all kernels have: binding a shape encodes nothing, and kernels take addresses and numbers alone. While an
epilogue runs, the next tile's factors arrive. It takes the halves of a tile one after the other, which leaves registers
and shared memory for wider tiles. Aligned rows of the result are stored through a descriptor, others by lanes.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpu_engine.gpu.epilogues import HEAVY, number, widest
from gpu_engine.gpu.gemm_kernels import (
    Factor,
    Product,
    emit_product,
    selected,
    tile_counts,
    write_epilogue,
    write_place,
    write_result,
    write_walks,
)
from gpu_engine.gpu.gemm_steps import Step
from gpu_engine.gpu.launches import is_multiple
from gpu_engine.gpu.printing import stored
from gpu_engine.gpu.text import KernelText
from gpu_engine.gpu.tiles import Choice, Epilogue, GemmTile, processors
from gpu_engine.ir import dims, expr
from gpu_engine.ir.dims import Dim
from gpu_engine.ir.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT8, DType
from gpu_engine.plan.lower import Lowering

PITCH_NBYTES = 16
"""Rows that descriptors describe begin at multiples of it, as do the matrices.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html"""
FACTORS: dict[str, tuple[tuple[DType, DType], ...]] = {
    "half": ((FLOAT16, FLOAT16), (BFLOAT16, BFLOAT16)),
    "converted": ((FLOAT32, FLOAT16), (FLOAT32, BFLOAT16)),
    "tf32": ((FLOAT32, FLOAT32),),
    "bytes": ((INT8, INT8),),
}
"""By family of tiles, the types of the factors in memory: what lies outside of them is 0 and adds nothing, and the
second goes from shared memory to matrix instructions as it is."""
LARGEST_ELEMENT = 4
"""Bytes of an element that descriptors store."""
BLACKWELL = 100
"""From here on Triton 3.6 keeps both halves of a tile in shared memory at once where nothing is computed of them."""
FEW_HEAVY = 2
"""Functions that take many registers, of which half a tile's epilogue has enough for so many."""


def is_describable(lowering: Lowering, product: Product, family: str) -> bool:
    """Whether descriptors can give the factors of a product, whatever its symbols are."""
    given = lowering.buffers[product.a.buffer].dtype, lowering.buffers[product.b.buffer].dtype
    if given not in FACTORS.get(family, ()) or product.batch or product.loop is not None:
        return False
    pairs = (product.a, product.m), (product.b, product.n)
    known = isinstance(product.k, int) and product.k > 0
    return known and all(_is_aligned(lowering, factor, extent, product.k) for factor, extent in pairs)


def _is_aligned(lowering: Lowering, factor: Factor, extent: Dim, k: Dim) -> bool:
    """Matrix instructions read elements that have not 16 bits only with what is summed over side by side."""
    nbytes = lowering.buffers[factor.buffer].dtype.itemsize
    if factor.inner == 1 and factor.outer == k:
        return is_multiple(k * nbytes, PITCH_NBYTES)
    turned = factor.outer == 1 and factor.inner == extent
    return turned and nbytes == 2 and is_multiple(extent * nbytes, PITCH_NBYTES)


def is_storable(lowering: Lowering, product: Product) -> bool:
    """Whether a descriptor can take the result of a product, whatever its symbols are."""
    nbytes = lowering.buffers[product.out].dtype.itemsize
    return nbytes <= LARGEST_ELEMENT and is_multiple(product.n * nbytes, PITCH_NBYTES)


def walking_epilogue(lowering: Lowering, product: Product, family: str, arch: int) -> Epilogue | None:
    """What the epilogue takes where programs can walk over the tiles of a product, else None."""
    if not is_describable(lowering, product, family):
        return None
    _, rows, columns = product.axes
    wide = [
        lowering.buffers[operand.buffer].dtype.itemsize
        for operand in product.operands
        if all(any(operand.strides[axis] != 0 for axis in axes) for axes in (rows, columns))
    ]
    heavy = sum(node.op in HEAVY for node in expr.walk(product.root)) > FEW_HEAVY
    nbytes = lowering.buffers[product.out].dtype.itemsize
    if arch >= BLACKWELL and product.root.op == "arg":
        nbytes *= 2
    return Epilogue(max(wide, default=0) + nbytes, heavy or bool(wide))


def emit_chosen(lowering: Lowering, product: Product, step: Step, choices: Iterable[Choice], arch: int) -> None:
    """Launch the kernels of all choices; those that are persistent need a describable product."""
    for choice in choices:
        if choice.persistent:
            emit_persistent(lowering, product, step, choice, processors(arch))
        else:
            emit_product(lowering, product, step, choice)


def emit_persistent(lowering: Lowering, product: Product, step: Step, choice: Choice, programs: int) -> None:
    """Launch up to `programs` programs that compute a product while m is in the choice's range."""
    share, tile = selected(product.m, choice), choice.tile
    if share == 0:
        return
    buffers = (product.a.buffer, product.b.buffer, product.out, *product.read)
    text = KernelText(lowering, f"persistent_{product.name}_{step.name}", widest=widest(lowering, buffers))
    down, across = dims.ceil_div(product.m, tile.block_m), dims.ceil_div(product.n, tile.block_n)
    _describe(text, "a_map", product.a, product.m, product.k, (tile.block_m, tile.block_k))
    _describe(text, "b_map", product.b, product.n, product.k, (tile.block_n, tile.block_k))
    through = is_storable(lowering, product)
    half = tile.block_m, tile.block_n // 2
    if through:
        _map(text, "out_map", product.out, (product.m, product.n), half)
    if is_multiple(product.k):
        text.line(f"tl.assume({_depth(text, product)} > 0)")
    tiles = " * ".join(tile_counts(text, product, tile))
    with text.block(f"for tile in tl.range(tl.program_id(0), {tiles}, tl.num_programs(0), flatten=True):"):
        _write_sums(text, product, step, tile)
        for part, first in (("left", 0), ("right", half[1])):
            text.line(f"sums = {part}")
            walks = write_walks(text, product, tile, first, half[1])
            if through:
                result = stored(write_epilogue(text, product, walks, str(half)), lowering.buffers[product.out].dtype)
                text.line(f"out_map.store([down * {tile.block_m}, across * {tile.block_n} + {first}], {result})")
            else:
                write_result(text, product, walks, str(half))
    reads = (product.a.buffer, product.b.buffer, *product.read)
    grid = (dims.minimum(down * across, programs) * share,)
    text.launch(grid, reads, (product.out,), num_warps=tile.num_warps, num_stages=tile.num_stages)


def _write_sums(text: KernelText, product: Product, step: Step, tile: GemmTile) -> None:
    """Lines that leave the sums of a tile in its halves, `left` and `right`."""
    write_place(text, product, tile, "tile")
    step.start(text, tile)
    with text.block(f"for k in range(0, {_depth(text, product)}, {tile.block_k}):"):
        text.line(f"a = {_block('a_map', product.a, f'down * {tile.block_m}', k_first=False)}")
        text.line(f"b = {_block('b_map', product.b, f'across * {tile.block_n}', k_first=True)}")
        step.add(text)
    text.line(f"halves = tl.reshape({step.total}, ({tile.block_m}, 2, {tile.block_n // 2}))")
    text.line("left, right = tl.split(tl.permute(halves, (0, 2, 1)))")


def _depth(text: KernelText, product: Product) -> str:
    with text.apart("span"):
        return number(text, product.k)


def _describe(text: KernelText, name: str, factor: Factor, extent: Dim, k: Dim, block: tuple[int, int]) -> None:
    """The descriptor of a factor of `extent` rows or columns; `block` is along these and along k."""
    if factor.inner == 1:
        _map(text, name, factor.buffer, (extent, k), block)
    else:
        _map(text, name, factor.buffer, (k, extent), block[::-1])


def _map(text: KernelText, name: str, buffer: int, shape: tuple[Dim, Dim], block: tuple[int, int]) -> None:
    """The descriptor of a matrix. How many rows it has matters to no copy: kernels that differ in it are one."""
    with text.apart(f"{name} rows"):
        rows = text.parameter(shape[0], hint=False)
    with text.apart(name):
        columns = number(text, shape[1])
    text.line(
        f"{name} = tl.make_tensor_descriptor({text.buffer(buffer)}, shape=[{rows}, {columns}], "
        f"strides=[{columns}, 1], block_shape=[{block[0]}, {block[1]}])"
    )


def _block(name: str, factor: Factor, at: str, *, k_first: bool) -> str:
    """A block of a factor from row or column `at` on, [k, columns] or [rows, k]."""
    lies_k_first = factor.inner != 1
    place = f"k, {at}" if lies_k_first else f"{at}, k"
    return f"{name}.load([{place}])" + ".T" * (lies_k_first != k_first)
