"""Reading memory as fast as the kernels do, to know what they could reach."""

from ctypes import byref, c_uint64

import torch
from torch import Tensor

from expertly.kernels import native_abi as abi
from expertly.kernels.native import library


def read_words(data: Tensor) -> int | None:
    """The sum of a tensor's 64-bit words, modulo 2^64, by all threads; None without the library.

    data: contiguous, on the CPU. Raises ValueError for a size or an address that 8 does not divide.
    """
    loaded = library()
    if loaded is None:
        return None
    if data.device.type != "cpu" or not data.is_contiguous():
        raise ValueError("read: data must be one piece of the CPU's memory")
    if not data.numel():
        return 0
    read = abi.typed(loaded.handle, "read")
    total = c_uint64()
    code = read(torch.get_num_threads(), data.data_ptr(), data.nbytes, byref(total))
    if code:
        raise ValueError(f"read: {data.nbytes} bytes do not divide into words (code {code})")
    return total.value
