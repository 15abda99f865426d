"""What a type checker is to know of a C extension: a `.pyi` beside it, made from the same headers when it is built.

- `write_stub(ffi, module, folder, included)`   folder/_nic.pyi for module "atoll.drivers.nic._nic"; `included`: modules
                                                 whose functions and constants are offered too

Integers, truth values and void are typed, constants have their values; whatever is a pointer or a structure is Any: in
C's own terms cffi checks it at each call.

This file is loaded by its path, when the package atoll is not yet installed: it imports nothing of Atoll.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cffi import model

_HEAD = "# Made from the headers when the extension is built (ipc/cstub.py): not to be edited, not to be committed.\n"


def write_stub(ffi: Any, module: str, folder: Path, included: Sequence[str]) -> None:
    """Leaves a stub alone that is right already, so that nothing looks newer than it is. What tests build has none."""
    if not module.startswith("atoll."):
        return
    lines = [_HEAD, "from typing import Any, Final\n", "\n"]
    bases = []
    for number, name in enumerate(included):
        lines.append(f"from {name} import _Lib as _Included{number}\n")
        bases.append(f"_Included{number}")
    lines += [f"\nclass _Lib({', '.join(bases)}):\n" if bases else "\nclass _Lib:\n"]
    members = list(_members(ffi))
    lines += members or ["    pass\n"]
    lines += ["\nlib: _Lib\n", "ffi: Any\n"]
    path = folder / f"{module.rpartition('.')[2]}.pyi"
    text = "".join(lines)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _members(ffi: Any) -> Iterator[str]:
    # What the builder has read is told by its parser alone; there is no public way before the compiler has run.
    for key, (declared, _) in sorted(ffi._parser._declarations.items()):
        kind, _, name = key.partition(" ")
        if declared in ffi._parser._included_declarations:
            continue
        if isinstance(declared, model.EnumType):
            for constant, value in zip(declared.enumerators, declared.enumvalues, strict=True):
                yield f"    {constant}: Final = {value}\n"
        elif kind == "macro":
            yield f"    {name}: Final = {declared}\n" if isinstance(declared, int) else f"    {name}: int\n"
        elif kind == "function":
            arguments = "".join(f", {_argument(at)}: {_type(each)}" for at, each in enumerate(declared.args))
            yield f"    def {name}(self{arguments}, /) -> {_type(declared.result)}: ...\n"
        elif kind in ("variable", "constant"):
            yield f"    {name}: {_type(declared)}\n"


def _argument(at: int) -> str:
    return f"argument_{at}"


def _type(declared: Any) -> str:
    if isinstance(declared, model.VoidType):
        return "None"
    if isinstance(declared, model.PrimitiveType):
        return {"_Bool": "bool", "float": "float", "double": "float"}.get(declared.name, "int")
    return "int" if isinstance(declared, model.EnumType) else "Any"
