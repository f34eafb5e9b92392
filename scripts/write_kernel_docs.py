"""Write docs/kernels.md from the docstrings of the public kernels, and docs/families.md from the table of families.

python scripts/write_kernel_docs.py           writes both
python scripts/write_kernel_docs.py --check   only compares
"""

import ast
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FunctionType

from routing_replay import kernels
from routing_replay.kernels.routing.families import FAMILIES, REFUSED, RoutingFamily
from routing_replay.kernels.routing.method import RoutingMethodType

DOCS = Path(__file__).parents[1] / "docs"
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
KERNELS_INTRO = """\
# Kernels

What `routing_replay.kernels` exports, from its docstrings (`make docs` writes this page, a test compares it). Letters in
shapes: T tokens, E experts, K experts of a token, H hidden size, I intermediate size of one expert, E_local experts on this
rank, S fused shared experts. `Runtime:` says whether an op waits for the device, allocates, fits a CUDA graph, gives
the same bits again, and has gradients. Which model uses which routing method: [families.md](families.md). Known pitfalls
and their tests: [pitfalls.md](pitfalls.md). Figures: [performance.md](performance.md).
"""
FAMILIES_INTRO = """\
# Hugging Face families and their routing methods

`routing_replay.kernels.routing.families.routing_method_of(config)` reads the method of a model from its `config.json`. Each
family here is compared with the router class of Transformers 5.23 on random rows: ids position by position, weights to
1e-6 (`tests/kernels/test_families.py`). A field that decides the routing and is missing is an error, not a default.
"""


def sections_of(docstring: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into what stands before its sections, and the sections with `Runtime` among them."""
    names = "|".join((*SECTIONS, "Runtime"))
    parts = re.split(rf"^({names}):[ ]*", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return parts[0].strip(), dict(zip(parts[1::2], parts[2::2], strict=True))


def entries_of(section: str) -> Iterator[tuple[str, str]]:
    """Yield the names of a section and what is said of them."""
    text = textwrap.dedent(section).strip("\n")
    for entry in re.split(r"\n(?=\S)", text):
        name, _, said = entry.partition(":")
        yield name.strip(), " ".join(said.split())


def paragraphs(text: str) -> str:
    """Join the lines of each paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def described(docstring: str, *, level: int) -> list[str]:
    """Return a docstring as Markdown."""
    text, sections = sections_of(docstring)
    lines = [paragraphs(text), ""]
    for name in SECTIONS:
        if name not in sections:
            continue
        lines += [f"{'#' * level} {'Arguments' if name == 'Args' else name}", ""]
        if name == "Returns":
            lines += [paragraphs(textwrap.dedent(sections[name]).strip()), ""]
            continue
        lines += [f"- `{item}`: {said}" for item, said in entries_of(sections[name])]
        lines.append("")
    if "Runtime" in sections:
        lines += [f"**Runtime:** {' '.join(sections['Runtime'].split())}", ""]
    return lines


def _annotation(value: object) -> str:
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:torch|routing_replay(?:\.\w+)*|collections\.abc)\.(?=[A-Z])", "", text)


def _default(value: object) -> str:
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)


def signature_of(function: FunctionType) -> str:
    """Return the signature, one parameter a line."""
    signature = inspect.signature(function)
    lines: list[str] = []
    was_keyword = False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not was_keyword:
            lines.append("    *,")
            was_keyword = True
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"  # fmt: skip
        lines.append(f"    {parameter.name}: {_annotation(parameter.annotation)}{default},")
    returned = _annotation(signature.return_annotation)
    if not lines:
        return f"{function.__name__}() -> {returned}"
    return "\n".join([f"{function.__name__}(", *lines, f") -> {returned}"])


def _strings_after(body: list[ast.stmt]) -> dict[str, str]:
    """Docstrings of assignments: the string that follows each."""
    found: dict[str, str] = {}
    for statement, after in pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Name):
                    found[target.id] = " ".join(str(after.value.value).split())
    return found


def _constant_docs() -> dict[str, str]:
    """Docstrings of the constants of all modules of the package."""
    found: dict[str, str] = {}
    root = Path(inspect.getfile(kernels)).parent
    for path in sorted(root.rglob("*.py")):
        found |= _strings_after(ast.parse(path.read_text()).body)
    return found


def _enum_part(cls: type[enum.Enum]) -> list[str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    said = _strings_after(body.body)
    members = [
        f"- `{name}` = `{member.value!r}`: {said.get(name, '')}".rstrip(": ")
        for name, member in cls.__members__.items()
    ]
    return [*described(cls.__doc__ or "", level=4), *members, ""]


def _class_part(cls: type) -> list[str]:
    lines = described(cls.__doc__ or "", level=4)
    public = {name: member for name, member in vars(cls).items() if not name.startswith("_")}
    properties = {name: item for name, item in public.items() if isinstance(item, property)}
    if properties:
        lines += ["#### Properties", ""]
        lines += [f"- `{name}`: {' '.join((item.__doc__ or '').split())}" for name, item in properties.items()]  # fmt: skip
        lines.append("")
    for name, member in public.items():
        method = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if isinstance(method, FunctionType):
            lines += [f"#### `{cls.__name__}.{name}`", "", "```python", signature_of(method), "```", ""]  # fmt: skip
            lines += described(method.__doc__ or "", level=5)
    return lines


def kernels_document() -> str:
    """Return docs/kernels.md: ops, then types, then constants."""
    exported = {name: getattr(kernels, name) for name in kernels.__all__}
    ops = [name for name, item in exported.items() if isinstance(item, FunctionType)]
    types = [name for name, item in exported.items() if isinstance(item, type)]
    constants = [name for name in exported if name not in {*ops, *types}]
    lines = [KERNELS_INTRO, "## Ops", ""]
    for name in sorted(ops):
        lines += [f"### `{name}`", "", "```python", signature_of(exported[name]), "```", ""]
        lines += described(exported[name].__doc__ or "", level=4)
    lines += ["## Types", ""]
    for name in sorted(types):
        cls = exported[name]
        is_enum = issubclass(cls, enum.Enum)
        lines += [f"### `{name}`", "", *(_enum_part(cls) if is_enum else _class_part(cls))]
    lines += ["## Constants", ""]
    said = _constant_docs()
    lines += [f"- `{name}` = `{exported[name]!r}`: {said[name]}" for name in sorted(constants)]
    return "\n".join(lines).rstrip() + "\n"


def _family_row(family: RoutingFamily) -> str:
    method = f"`{family.method.name}`"
    if family.norm_field is not None:
        other = "not divided by the sum" if family.unnormalized is None else f"`{family.unnormalized.name}`"  # fmt: skip
        method += f"; where `{family.norm_field}` is false {other}"
    fields = [f"`{name}`" for name in (*(family.group_fields or ()), family.scale_field) if name]
    needs = [f"`{name}` = {' or '.join(map(repr, values))}" for name, values in family.needs]
    types = ", ".join(f"`{name}`" for name in sorted(family.model_types))
    bias = f"`{family.bias}`" if family.bias else ""
    return f"| {types} | {method} | {', '.join(fields)} | {'; '.join(needs)} | {bias} |"


def families_document() -> str:
    """Return docs/families.md."""
    lines = [FAMILIES_INTRO, "| `model_type` | method | fields read beside E and K | must be | bias tensor |",
             "|---|---|---|---|---|"]  # fmt: skip
    order = list(RoutingMethodType)
    for family in sorted(FAMILIES, key=lambda item: order.index(item.method)):
        lines.append(_family_row(family))
    lines += [
        "",
        "A factor that a model applies to the sum of its experts instead of their weights (`laguna`, `minimax_m3_vl_text`, "
        "`step3p5`, `beam`) is in `routed_scaling_factor` too: the output is the same up to rounding.",
        "",
        "## Families that no method expresses",
        "",
        "`routing_method_of` raises `UnsupportedModelError` with the reason. Their routing can still be captured by an "
        "engine and replayed in a trainer: `routing_replay.replay` uses the model's own router.",
        "",
        "| `model_type` | its router |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write or compare both documents."""
    documents = {"kernels.md": kernels_document(), "families.md": families_document()}
    stale: list[str] = []
    for name, text in documents.items():
        path = DOCS / name
        if not path.is_file() or path.read_text() != text:
            stale.append(f"docs/{name}")
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)} differ from the docstrings; run python {sys.argv[0]}")


if __name__ == "__main__":
    main()
