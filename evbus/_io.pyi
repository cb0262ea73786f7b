"""System calls between sockets and rings. Docstrings are in `_io.pyx`."""

from evbus._frame import Ring

WRITE_BYTES: int

def fill(fd: int, ring: Ring, limit: int) -> int:
    """Read once into a ring: bytes read, 0 at the end of the stream, -1 if nothing can be read now. Raises OSError."""

def flush(fd: int, ring: Ring) -> int:
    """Write once from a ring, lent segment included: bytes left. Afterwards nothing is lent. Raises OSError."""

def settle(ring: Ring) -> None:
    """Copy what is lent to a ring into the ring itself."""
