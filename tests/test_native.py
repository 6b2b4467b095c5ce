"""The kernels without Python: `tests/native` compares every set of instructions with integers of 64 bits."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def need(*programs):
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def make(target):
    # A child of make -j would wait for a job server that pytest does not hand on.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(
        ["make", target], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_kernels_are_exact_and_keep_to_their_memory():
    need("make", "g++")
    assert "all right" in make("test-sanitized")


def test_avx512_is_exact_where_it_is_emulated():
    need("make", "g++")
    probe = subprocess.run(
        ["g++", "-E", "-x", "c++", "-"], input="#include <simde/x86/avx512.h>", capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip("SIMDe is not installed (libsimde-dev)")
    output = make("test-avx512")
    assert "avx512: " in output
    assert "amx: " in output


def test_neon_is_exact_where_it_is_emulated():
    need("make", "aarch64-linux-gnu-g++", "qemu-aarch64")
    output = make("test-neon")
    assert "neon_dotprod: " in output
    assert output.count("all right") == 2
