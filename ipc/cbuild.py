"""How every C extension of Atoll is built: one function, called by the build script beside each extension's C.

- `make_ffi(module, headers, sources, here, libraries=(), include=())` returns the ready cffi builder.
- `cdef_of(text, name, constants)` is the part of a header that cffi reads.

A header is read by the compiler as a whole, and by cffi between lines that hold nothing but these comments:

    /* cffi:begin */
    #define RING_SLOTS (1 << 12)                    a number, or an expression of numbers and earlier names
    enum opcode { OP_READ = 1, OP_WRITE = 2 };
    struct descriptor { uint64_t address; ... };    cffi checks sizes and offsets against the compiler's
    int ring_push(struct ring *ring, ...);          prototypes
    /* cffi:end */

so that no declaration exists twice. Outside these regions stays what cffi cannot read: #include, #if, macros with
arguments, _Static_assert, function bodies. Inside, `_Atomic`, `_Alignas(...)`, `__attribute__((...))` and
`static inline` before a prototype are allowed and hidden from cffi; padding is therefore written out as a member, and
where it is not, the first use fails and names the struct. What only cffi shall read stands in a comment of its own:
a struct with the line `/* cffi: ...; */` may have members, alignment and padding that cffi need not know.

This file is loaded by its path, when the package atoll is not yet installed: it imports nothing of Atoll.
"""

from __future__ import annotations

import ast
import importlib.util
import operator
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cffi

ROOT = Path(__file__).resolve().parent.parent

COMPILE_ARGS = (
    "-O2",
    "-g",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-UNDEBUG",  # assert stays on: extension builds switch it off by default
    "-fno-strict-aliasing",  # shared memory is seen through several types
    "-fvisibility=hidden",  # no name of ours meets one of the interpreter's or of another extension
)

# What each extension of a domain is linked with.
DOMAIN_SOURCES = ("ipc/domain.c", "ipc/lookup.c", "ipc/spin.c", "ipc/place.c")

# The code that cffi generates is not ours to tidy: behind the last of our headers these warnings are off.
GENERATED_CODE_IGNORES = ("-Wunused-parameter", "-Wsign-compare", "-Wtype-limits", "-Wmissing-field-initializers")


class Extension(cffi.FFI):
    """A builder that knows its headers and the values of their #defines, for extensions that include it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = ""
        self.constants: dict[str, int] = {}
        self.headers: list[Path] = []


def make_ffi(
    module: str,
    headers: Sequence[str],
    sources: Sequence[str],
    here: str | Path,
    libraries: Sequence[str] = (),
    include: Sequence[str] = (),
) -> Extension:
    """The builder of extension `module` (such as "atoll.ipc._ipc").

    headers:   whose regions the extension offers to Python; one comes after those of them that it includes. Like
               sources, a path is taken from `here` (the build script's folder) or, if there is none there, from the
               root ("ipc/ring.c").
    sources:   C files to compile in. A file may be in several extensions; each then has its own copy, statics too.
    libraries: such as "uring", "xxhash".
    include:   build scripts ("ipc/build_ipc.py") whose types, constants and functions are offered too (ffi.include).
               Their headers are not to be named again in `headers`.
    """
    folder = Path(here).resolve()
    header_paths = _in_order([_find(folder, header) for header in headers])
    source_paths = [_find(folder, source) for source in sources]

    ffi = Extension()
    for script in include:
        included = _load_build_script(script)
        ffi.include(included)
        ffi.constants |= included.constants
        ffi.headers += included.headers  # cffi repeats its enums
    for path in header_paths:
        text = cdef_of(path.read_text(encoding="utf-8"), _from_root(path), ffi.constants)
        try:
            ffi.cdef(text)
        except (cffi.CDefError, cffi.FFIError) as error:
            raise SystemExit(f"{_from_root(path)}: cffi cannot read a cffi:begin region: {error}") from error

    ffi.headers += header_paths

    sanitizers = os.environ.get("ATOLL_SANITIZE", "")
    sanitize_args = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer"] if sanitizers else []
    preamble = [
        f"/* sanitizers: {sanitizers or 'none'} */",  # another choice is another source: it is compiled again
        *(f'#include "{_from_root(path)}"' for path in ffi.headers),
        *(f'#pragma GCC diagnostic ignored "{warning}"' for warning in GENERATED_CODE_IGNORES),
    ]
    ffi.set_source(
        module,
        "\n".join(preamble) + "\n",
        sources=[_from_here(path) for path in source_paths],
        include_dirs=[_from_here(ROOT)],
        libraries=list(libraries),
        extra_compile_args=[*COMPILE_ARGS, *sanitize_args],
        extra_link_args=sanitize_args,
        depends=[_from_here(path) for path in _depends(folder, header_paths, source_paths)],
    )
    ffi.module = module
    cstub = _load(Path(__file__).resolve().parent / "cstub.py")
    cstub.write_stub(ffi, module, folder, [_load_build_script(script).module for script in include])
    return ffi


def headers_in(here: str | Path) -> list[str]:
    """All headers of a folder that have a region for cffi."""
    return sorted(path.name for path in Path(here).glob("*.h") if _BEGIN in path.read_text(encoding="utf-8"))


def _load_build_script(script: str) -> Extension:
    path = ROOT / script
    if not path.is_file():
        raise SystemExit(f"{script}: no such build script")
    return _load(path).ffi


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"atoll_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# --- The part of a header that cffi reads ---------------------------------------------------------------------------

_BEGIN, _END = "/* cffi:begin */", "/* cffi:end */"
_FOR_CFFI = re.compile(r"/\* cffi: (.*?) \*/")
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_DEFINE = re.compile(r"\s*#\s*define\s+(?P<name>\w+)(?P<arguments>\()?(?P<value>.*)")
_HIDDEN = re.compile(
    r"\b_Alignas\s*\([^()]*(?:\([^()]*\)[^()]*)*\)"
    r"|__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)"
    r"|\bstatic\s+inline\b|\b_Noreturn\b|\b__extension__\b"
)
_ATOMIC_OF = re.compile(r"\b_Atomic\s*\(([^()]*)\)")  # _Atomic(uint64_t)
_ATOMIC = re.compile(r"\b_Atomic\b")


def cdef_of(text: str, name: str, constants: dict[str, int]) -> str:
    """The regions of header `text`, made readable for cffi. Line numbers stay those of the header.

    `constants` holds the values of #defines met so far and receives this header's.
    """
    lines = _regions(text, name)
    shown = _FOR_CFFI.sub(r"\1", "\n".join(lines))
    joined = _COMMENT.sub(lambda match: "\n" * match.group().count("\n"), shown)
    result = []
    for number, line in enumerate(joined.split("\n"), start=1):
        if not line.lstrip().startswith("#"):
            result.append(line)
            continue
        define = _DEFINE.fullmatch(line)
        if define is None or define["arguments"] or line.endswith("\\"):
            raise SystemExit(f"{name}:{number}: a cffi region may hold no directive but '#define NAME value'")
        value = evaluate(define["value"], constants)
        if value is None:
            result.append(f"#define {define['name']} ...")  # the compiler knows
        else:
            constants[define["name"]] = value
            result.append(f"#define {define['name']} {value}")  # cffi checks it against the compiler's
    code = _HIDDEN.sub("", "\n".join(result))
    return _ATOMIC.sub("", _ATOMIC_OF.sub(r"\1", code))


def _regions(text: str, name: str) -> list[str]:
    """All lines of `text`, those outside the regions emptied."""
    lines, inside, found = [], False, False
    for number, line in enumerate(text.splitlines(), start=1):
        marker = line.strip()
        if marker in (_BEGIN, _END):
            if inside == (marker == _BEGIN):
                raise SystemExit(f"{name}:{number}: {marker} out of turn")
            inside = not inside
            found = True
            lines.append("")
        else:
            lines.append(line if inside else "")
    if inside:
        raise SystemExit(f"{name}: {_BEGIN} without {_END}")
    if not found:
        raise SystemExit(f"{name}: no line {_BEGIN}")
    return lines


_INTEGER = re.compile(r"\b(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uUlL]+\b")
_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,  # of what is not negative, as sizes are
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitXor: operator.xor,
}


def evaluate(expression: str, constants: dict[str, int]) -> int | None:
    """The value of a C expression of integers and known names, or None if it is more than that."""

    def value(node: ast.AST) -> int:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=name):
                return constants[name]
            case ast.BinOp(left=left, op=op, right=right):
                a, b = value(left), value(right)
                if a < 0 or b < 0:
                    raise ValueError(expression)
                return int(_OPERATORS[type(op)](a, b))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        raise ValueError(expression)

    try:
        return value(ast.parse(_INTEGER.sub(r"\1", expression).strip(), mode="eval").body)
    except (SyntaxError, KeyError, ValueError, ZeroDivisionError):
        return None


# --- Paths ----------------------------------------------------------------------------------------------------------


def _find(folder: Path, name: str) -> Path:
    for base in (folder, ROOT):
        if (base / name).is_file():
            return (base / name).resolve()
    raise SystemExit(f"{folder}: no file {name}, neither here nor in {ROOT}")


_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def _in_order(headers: Sequence[Path]) -> list[Path]:
    """`headers`, each behind those that it includes."""
    ordered: list[Path] = []
    seen: set[Path] = set()

    def place(header: Path) -> None:
        if header in seen or not header.is_file():
            return
        seen.add(header)
        for name in _INCLUDE.findall(header.read_text(encoding="utf-8")):
            place((ROOT / name).resolve())
        if header in headers:
            ordered.append(header)

    for header in headers:
        place(header)
    return ordered


def _depends(folder: Path, headers: Iterable[Path], sources: Iterable[Path]) -> list[Path]:
    """All whose change makes the extension stale."""
    headers, sources = list(headers), list(sources)
    folders = {ROOT / "ipc", folder, *(path.parent for path in (*headers, *sources))}
    found = {header for each in folders for header in each.glob("*.h")}
    scripts = {script for each in folders for script in each.glob("build_*.py")}
    return sorted(found | scripts | {*headers, *sources, Path(__file__).resolve()})


def _from_root(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _from_here(path: Path) -> str:
    """As setuptools wants it: relative to the folder of setup.py, which it runs in."""
    return os.path.relpath(path)
