"""How much memory a run may take."""

from awq_pycuda.errors import InputError

MEMORY_SHARE = 0.8  # managed memory must never oversubscribe the card, and the host must not swap


class BeyondMemory(InputError):
    """What would take more than the allowed share of the free memory."""


def refuse_beyond_memory(key: str, needed: int, free: int, where: str) -> None:
    """Refuses what would take more than the allowed share of the free memory.

    Args:
        key: what the user gave, as key=value.
        needed: bytes that it takes.
        free: bytes that are free.
        where: whose memory it is.

    Raises:
        BeyondMemory: it takes more.
    """
    if needed > MEMORY_SHARE * free:
        raise BeyondMemory(
            f"{key}: needs {needed / 2**30:,.1f} GiB of the {where}; "
            f"allowed: up to {MEMORY_SHARE:.0%} of the {free / 2**30:,.1f} GiB free"
        )
