"""Builds the Cython extensions; everything else about the package stands in pyproject.toml.

Every `evbus/*.pyx` becomes an extension of the same name. Environment variables choose the build:

EVBUS_BUILD  release   (default) optimised and hardened
             debug     no optimisation, C assertions and symbols for a debugger
             sanitize  AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize` for how to run it
             annotate  release, and beside each translated file an HTML page that shows which lines touch Python objects
EVBUS_STRICT 1: warnings of the C compiler, and warnings and performance hints of Cython, are errors
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODES = ("release", "debug", "sanitize", "annotate")
MODE = os.environ.get("EVBUS_BUILD", "") or "release"
STRICT = os.environ.get("EVBUS_STRICT", "") not in ("", "0")

if MODE not in MODES:
    sys.exit(f"EVBUS_BUILD={MODE!r}: use one of {', '.join(MODES)}")

# For gcc and clang. The three -Wno- are for patterns of Cython's own code (slots that take an argument and ignore it,
# type tables that name only the first fields, casts between the kinds of PyCFunction), not of ours.
UNIX_FLAGS = [
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-Wno-cast-function-type",
    "-fno-strict-aliasing",
    "-fstack-protector-strong",
]
UNIX_MODE_FLAGS = {
    # The -U first: some distributions define another level by default, and defining it twice is a warning. -g0 takes
    # back the -g of Python's own flags, which would make the wheel four times as large.
    "release": ["-O3", "-g0", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"],
    "debug": ["-O0", "-g3", "-UNDEBUG", "-U_FORTIFY_SOURCE"],
    # Python's own flags carry -fwrapv, under which UBSAN is silent about signed overflow: hence -fno-wrapv.
    "sanitize": [
        "-O1",
        "-g",
        "-UNDEBUG",
        "-U_FORTIFY_SOURCE",
        "-fsanitize=address,undefined",
        "-fno-wrapv",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
}
UNIX_MODE_FLAGS["annotate"] = UNIX_MODE_FLAGS["release"]
UNIX_LINK_FLAGS = {"sanitize": ["-fsanitize=address,undefined"]}
MSVC_FLAGS = {"debug": ["/Od", "/W3"], "annotate": ["/O2", "/W3"], "release": ["/O2", "/W3"]}


class BuildExt(build_ext):
    """Translates the .pyx files when a build really starts, and gives the flags that this compiler understands."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if MODE != "release" or STRICT:
            self.force = True  # an extension of another mode may lie there and look up to date
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def build_extensions(self) -> None:
        # Here and not earlier: `sdist` and `egg_info` also ask for the list of extensions, and must neither translate
        # nor put translated files into the sdist.
        translated = {extension.name: extension for extension in self._translate()}
        msvc = self.compiler.compiler_type == "msvc"
        if msvc and MODE == "sanitize":
            sys.exit("EVBUS_BUILD=sanitize needs gcc or clang")
        for extension in self.extensions:
            extension.sources = translated[extension.name].sources
            if msvc:
                extension.extra_compile_args = MSVC_FLAGS[MODE] + (["/WX"] if STRICT else [])
            else:
                extension.extra_compile_args = UNIX_FLAGS + UNIX_MODE_FLAGS[MODE] + (["-Werror"] if STRICT else [])
                extension.extra_link_args = list(UNIX_LINK_FLAGS.get(MODE, []))
        super().build_extensions()

    def _translate(self) -> list[Extension]:
        from Cython.Build import cythonize  # only a build needs it; `python setup.py --version` does not

        said = io.StringIO()
        with contextlib.redirect_stderr(_Both(said)):
            translated = cythonize(
                list(self.extensions),
                build_dir=f"build/cython-{MODE}",
                annotate=MODE == "annotate",
                force=STRICT or self.force,
                compiler_directives={"language_level": 3},
            )
        if STRICT and said.getvalue().strip():
            # Cython says nothing at all about code that it has no remark on.
            sys.exit("EVBUS_STRICT: Cython has remarks on the code (see above); mend them or the build fails")
        return list(translated)


class _Both(io.TextIOBase):
    """Writes to standard error and keeps a copy."""

    def __init__(self, copy: io.StringIO) -> None:
        self._copy = copy
        self._out = sys.stderr

    def write(self, text: str) -> int:
        self._copy.write(text)
        return self._out.write(text)

    def flush(self) -> None:
        self._out.flush()


def extensions() -> list[Extension]:
    # Relative paths with forward slashes, as setuptools wants them; sorted, so that builds are alike.
    here = Path(__file__).parent
    depends = sorted(
        path.relative_to(here).as_posix() for suffix in ("pxd", "h") for path in here.glob(f"evbus/*.{suffix}")
    )
    return [
        Extension(f"evbus.{path.stem}", [path.relative_to(here).as_posix()], include_dirs=["evbus"], depends=depends)
        for path in sorted(here.glob("evbus/*.pyx"))
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
