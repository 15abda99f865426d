"""What cffi reads of a header (ipc/cbuild.py)."""

import importlib
import re
from pathlib import Path

import pytest

from atoll.ipc.cbuild import cdef_of, evaluate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("4096", 4096),
        ("(1 << 12)", 4096),
        ("0x200000000000ULL", 0x200000000000),
        ("PAGE / 8 - 1", 511),
        ("-1", -1),
        ("(PAGE | 3) & ~0", None),  # more than it knows: the compiler is asked
        ("sizeof(int)", None),
        ("UNKNOWN + 1", None),
        ('"text"', None),
        ("", None),
        ("1 / 0", None),
    ],
)
def test_values_of_defines(expression: str, value: int | None) -> None:
    assert evaluate(expression, {"PAGE": 4096}) == value


HEADER = """\
#include <stdint.h>
/* cffi:begin */
#define PAGE (1 << 12) /* a page */
#define WORDS PAGE / 8 // of it
#define SIZE sizeof(int)
struct ring {
    _Alignas(64) _Atomic uint32_t tail; /* two
                                           lines */
    _Atomic(uint64_t) head;
    /* cffi: ...; */
};
static inline int ring_count(const struct ring *ring);
/* cffi:end */
#define HIDDEN(x) x
"""


def test_regions_only_and_in_their_lines() -> None:
    constants: dict[str, int] = {}
    text = cdef_of(HEADER, "ring.h", constants)
    assert constants == {"PAGE": 4096, "WORDS": 512}
    lines = [" ".join(line.split()) for line in text.split("\n")]
    assert lines == [
        "",
        "",
        "#define PAGE 4096",
        "#define WORDS 512",
        "#define SIZE ...",
        "struct ring {",
        "uint32_t tail;",
        "",
        "uint64_t head;",
        "...;",
        "};",
        "int ring_count(const struct ring *ring);",
        "",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int x;", "ring.h: no line /* cffi:begin */"),
        ("/* cffi:begin */\n", "ring.h: /* cffi:begin */ without /* cffi:end */"),
        ("/* cffi:end */\n", "ring.h:1: /* cffi:end */ out of turn"),
        ("/* cffi:begin */\n#if 1\n/* cffi:end */\n", "ring.h:2: a cffi region may hold no directive"),
        ("/* cffi:begin */\n#define F(x) x\n/* cffi:end */\n", "ring.h:2: a cffi region may hold no directive"),
    ],
)
def test_what_cffi_cannot_read_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        cdef_of(text, "ring.h", {})
    assert str(raised.value).startswith(message)


STUB_NAME = re.compile(r"^    (?:def )?([A-Za-z]\w*)[:(]", re.MULTILINE)
ROOT = Path(__file__).resolve().parent.parent
STUBS = sorted(ROOT.glob("[a-z]*/**/_*.pyi"))


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_a_stub_names_what_the_extension_offers(stub: Path) -> None:
    folder = stub.parent.relative_to(ROOT)
    lib = importlib.import_module(f"atoll.{str(folder).replace('/', '.')}.{stub.stem}").lib
    text = stub.read_text()
    if "_Included0" in text:  # which dir() does not list
        text += (ROOT / "ipc/_ipc.pyi").read_text()
    named = STUB_NAME.findall(text)
    assert set(dir(lib)) <= set(named)
    assert [name for name in named if not hasattr(lib, name)] == []


def test_there_are_stubs() -> None:
    assert {path.parent for path in STUBS} == {path.parent for path in ROOT.glob("[a-z]*/**/build_*.py")}
