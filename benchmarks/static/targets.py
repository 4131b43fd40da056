"""What a multiprocessor has, and how many blocks of a kernel fit into it.

NVIDIA's limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; the units in which registers and shared memory are handed out are those of the
occupancy calculator in Nsight Compute; tensor memory is in the PTX ISA, "Tensor Memory". AMD's
are those by which LLVM counts waves (``AMDGPUBaseInfo.cpp``, gfx90a and later) and the CDNA3 ISA
guide's: 4 SIMDs with 512 vector registers a lane, 64 KiB of local memory.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Of a multiprocessor, or of AMD's compute unit."""

    warp_size: int
    partitions: int
    """Which have the registers, and the warps, in equal shares."""
    warps: int
    blocks: int
    registers: int
    """Of 32 bits, of a partition."""
    register_unit: int
    """In which a warp gets them."""
    shared: int
    """Bytes of shared memory."""
    shared_unit: int
    shared_reserved: int
    """Bytes of a block that the system takes."""
    block_shared: int
    """Bytes that one block may have."""
    tensor_columns: int = 0
    """Of tensor memory."""


_HOPPER = Limits(32, 4, 64, 32, 16384, 256, 228 << 10, 128, 1024, 227 << 10)
LIMITS = {
    "sm_80": _HOPPER._replace(shared=164 << 10, block_shared=163 << 10),
    "sm_90": _HOPPER,
    "sm_90a": _HOPPER,
    "sm_100": _HOPPER._replace(tensor_columns=512),
    # 512 registers of 64 lanes, in steps of 8 a lane; blocks of several waves take one of 16
    # barriers each.
    "gfx942": Limits(64, 4, 32, 16, 512 * 64, 8 * 64, 64 << 10, 512, 0, 64 << 10),
}
TRITON_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
CUDA_TARGETS = ("sm_80", "sm_90a")


class Occupancy(NamedTuple):
    """The most of a kernel that a multiprocessor holds at a time."""

    blocks: int
    warps: int
    share: float
    """Of the warps that it could hold."""
    bound: str
    """What there would have to be more of."""


def occupancy(
    target: str, threads: int, registers: int, shared: int, tensor_columns: int = 0
) -> Occupancy:
    """How many blocks fit, by registers, memory and the number of warps and blocks.

    Args:
        target: A key of :data:`LIMITS`.
        threads: Of a block.
        registers: Of a thread.
        shared: Bytes of a block, static and dynamic.
        tensor_columns: Of tensor memory, of a block.
    """
    limits = LIMITS[target]
    warps = _ceil(threads, limits.warp_size)
    of_warp = _round_up(max(registers, 1) * limits.warp_size, limits.register_unit)
    room = {
        "warps": limits.warps // warps,
        # A wave of AMD's by itself needs no barrier.
        "blocks": limits.warps if limits.warp_size == 64 and warps == 1 else limits.blocks,
        "registers": limits.registers // of_warp * limits.partitions // warps,
    }
    of_block = _round_up(shared + limits.shared_reserved, limits.shared_unit)
    if of_block > 0:
        room["shared memory"] = limits.shared // of_block
    if tensor_columns > 0:
        room["tensor memory"] = limits.tensor_columns // tensor_columns
    bound = min(room, key=lambda resource: room[resource])
    blocks = room[bound]
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, bound)


def _ceil(n: int, divisor: int) -> int:
    return -(-n // divisor)


def _round_up(n: int, unit: int) -> int:
    return _ceil(n, unit) * unit
