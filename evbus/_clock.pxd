# The system's clock behind the interface of `_outbox.Clock`.
from evbus._outbox cimport Clock


cdef class SystemClock(Clock):
    pass
