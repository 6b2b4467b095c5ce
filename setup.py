"""The compiled part; all else is in setup.cfg."""

from glob import glob

from setuptools import Extension, setup


# The kernels know nothing of torch, so that building them needs a C++ compiler and nothing else. Without one they are left
# out, and packed models run in plain torch.
setup(
    ext_modules=[
        Extension(
            "quantformer_hf.kernels._native",
            sources=sorted(glob("quantformer_hf/csrc/*.cpp")),
            depends=sorted(glob("quantformer_hf/csrc/*.h")),
            # Every instruction set is to round alike: no product is fused with the sum after it.
            # Vectors are handed over by inlined functions alone: that calls differ between instruction sets does not matter.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-Wno-psabi"],
            language="c++",
            optional=True,
        )
    ]
)
