"""How far packed weights may be from exact arithmetic, and how far they are."""


def tolerance(path, bits):
    """Int8 activations in groups of 32 cost up to 1.3e-2; nothing else does."""
    return 1.3e-2 if path == "native" and bits < 16 else 1e-5


def error(out, exact):
    out, exact = out.detach().double(), exact.detach().double()
    return float((out - exact).norm() / exact.norm())
