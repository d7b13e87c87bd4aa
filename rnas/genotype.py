"""What a search returns: for every cell type, the operations and inputs of each node."""

from __future__ import annotations

import ast
import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from .spaces import NUM_INPUTS, SPACES

PRIMITIVES = tuple(dict.fromkeys(name for space in SPACES.values() for name in space.primitives if name != "none"))
CLASSIC_NAMES = {"reduction": "reduce"}  # the DARTS family writes `reduce`; every other cell type has one name
PUBLISHED_FILE = Path(__file__).parent / "assets" / "genotypes.json"

Node = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Genotype:
    """A discrete architecture.

    cells: cell type -> one entry per intermediate node -> its (operation, input state) pairs. States 0 and 1 are the
    outputs of the two cells before, state 2 + j is node j. concat: the states whose channels make the output.
    Raises ValueError for an unknown operation, an input that is not an earlier state, or an empty cell.
    """

    cells: dict[str, tuple[Node, ...]]
    concat: tuple[int, ...] = (2, 3, 4, 5)

    def __post_init__(self) -> None:
        if not isinstance(self.cells, dict) or not self.cells:
            raise ValueError(
                f"a genotype needs a dict of cells, such as {{'normal': ..., 'reduction': ...}}; got {self.cells!r}"
            )
        cells = {
            cell_type: tuple(_node(node, cell_type, j) for j, node in enumerate(nodes))
            for cell_type, nodes in self.cells.items()
        }
        counts = {cell_type: len(nodes) for cell_type, nodes in cells.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise ValueError(f"every cell type needs the same number of nodes, at least one; got {counts}")
        states = NUM_INPUTS + next(iter(counts.values()))
        concat = tuple(self.concat) if isinstance(self.concat, (list, tuple, range)) else ()
        known = all(isinstance(state, int) and 0 <= state < states for state in concat)
        if not concat or not known or len(set(concat)) != len(concat):
            raise ValueError(f"concat must list states from 0 to {states - 1}, each once; got {self.concat!r}")
        object.__setattr__(self, "cells", cells)
        object.__setattr__(self, "concat", concat)

    def __hash__(self) -> int:
        return hash((tuple(self.cells.items()), self.concat))

    def to_dict(self) -> dict:
        """Plain lists and strings, as the JSON file holds them."""
        cells = {
            cell_type: [[[op, source] for op, source in node] for node in nodes]
            for cell_type, nodes in self.cells.items()
        }
        return {"cells": cells, "concat": list(self.concat)}

    def save(self, path: str | Path) -> Path:
        """Write the genotype as JSON."""
        from .runs import write_text

        return write_text(Path(path), to_json(self))


def _node(node: object, cell_type: str, j: int) -> Node:
    """Check node j of a cell and return it as tuples."""
    where = f"cell {cell_type!r}, node {j} (state {NUM_INPUTS + j})"
    if not isinstance(node, (list, tuple)) or not node:
        raise ValueError(f"{where}: expected a list of (operation, input) pairs, got {node!r}")
    pairs = []
    for pair in node:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{where}: expected a pair (operation, input), got {pair!r}")
        operation, source = pair
        if operation not in PRIMITIVES:
            near = difflib.get_close_matches(str(operation), PRIMITIVES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRIMITIVES)}"
            raise ValueError(f"{where}: unknown operation {operation!r}; {hint}")
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < NUM_INPUTS + j:
            raise ValueError(f"{where}: input must be an earlier state, 0 to {NUM_INPUTS + j - 1}; got {source!r}")
        pairs.append((operation, source))
    return tuple(pairs)


def from_dict(values: dict) -> Genotype:
    """A genotype from {"cells": ..., "concat": ...}. Raises ValueError for anything else."""
    if not isinstance(values, dict) or "cells" not in values:
        raise ValueError('a genotype needs the key "cells" (and may have "concat")')
    cells = values["cells"]
    if not isinstance(cells, dict) or not all(isinstance(nodes, (list, tuple)) and nodes for nodes in cells.values()):
        raise ValueError(f'"cells" must be a dict of non-empty lists of nodes; got {cells!r}')
    nodes = len(next(iter(cells.values()), ()))
    return Genotype(cells, values.get("concat", tuple(range(NUM_INPUTS, NUM_INPUTS + nodes))))


def to_json(genotype: Genotype) -> str:
    """The genotype as JSON text, one node a line, the same text for the same genotype."""
    blocks = []
    for cell_type, nodes in genotype.to_dict()["cells"].items():
        rows = ",\n".join(f"      {json.dumps(node)}" for node in nodes)
        blocks.append(f"    {json.dumps(cell_type)}: [\n{rows}\n    ]")
    return '{\n  "cells": {\n' + ",\n".join(blocks) + f'\n  }},\n  "concat": {json.dumps(list(genotype.concat))}\n}}\n'


def from_json(text: str) -> Genotype:
    """The genotype in a JSON text. Raises ValueError where it is not JSON or not a genotype."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    return from_dict(values)


def to_text(genotype: Genotype) -> str:
    """The classic text of the DARTS family: `Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=[2, ...], ...)`.

    Raises ValueError where a node has not exactly two inputs, which that text cannot say.
    """
    parts = []
    for cell_type, nodes in genotype.cells.items():
        if any(len(node) != 2 for node in nodes):
            raise ValueError(
                f"the classic text holds exactly two inputs per node; cell {cell_type!r} has {[len(n) for n in nodes]}"
            )
        name = CLASSIC_NAMES.get(cell_type, cell_type)
        pairs = [pair for node in nodes for pair in node]
        parts.append(f"{name}={pairs!r}, {name}_concat={list(genotype.concat)!r}")
    return f"Genotype({', '.join(parts)})"


def from_text(text: str) -> Genotype:
    """A genotype from the classic text, with lists or `range(2, 6)` as concat; a leading `NAME =` is allowed.

    The text is parsed, never executed. Raises ValueError where it is not such a text.
    """
    try:
        tree = ast.parse(text.strip())
        statement = tree.body[0]
        call = statement.value if isinstance(statement, (ast.Assign, ast.Expr)) else None
        if (
            len(tree.body) != 1
            or not isinstance(call, ast.Call)
            or getattr(call.func, "id", "") != "Genotype"
            or call.args
        ):
            raise ValueError("expected one Genotype(name=..., name_concat=...)")
        fields = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, IndexError) as error:
        raise ValueError(f"not a classic Genotype(...) text: {error}") from None
    names = [name for name in fields if name and not name.endswith("_concat")]
    lists = [fields.get(f"{name}_concat") for name in names]
    concats = {tuple(each) if isinstance(each, (list, tuple)) else () for each in lists}
    if len(concats) != 1 or () in concats:
        raise ValueError(f"every cell needs a NAME_concat, and all the same one; got {fields}")
    spoken = {classic: cell_type for cell_type, classic in CLASSIC_NAMES.items()}
    return Genotype({spoken.get(name, name): _pairs_to_nodes(fields[name], name) for name in names}, concats.pop())


def _literal(node: ast.expr) -> object:
    """The value of a literal or of range(a, b)."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "range":
        return list(range(*(ast.literal_eval(arg) for arg in node.args)))
    return ast.literal_eval(node)


def _pairs_to_nodes(pairs: object, name: str) -> tuple:
    """The flat list of the classic text as nodes of two inputs each."""
    if not isinstance(pairs, (list, tuple)) or len(pairs) % 2 or not pairs:
        raise ValueError(f"{name} must be a list of (operation, input) pairs, two per node; got {pairs!r}")
    return tuple(tuple(pairs[i : i + 2]) for i in range(0, len(pairs), 2))


def published() -> dict[str, Genotype]:
    """The published genotypes that ship with the package, by name (DARTS_V2, PC_DARTS_CIFAR, RACL, ARNAS, ...)."""
    entries = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
    return {name: from_dict(entry) for name, entry in entries.items()}


def load(source: str | Path) -> Genotype:
    """A genotype from a run folder, a .json file, a file with the classic text, or a published name.

    Raises FileNotFoundError where `source` is none of these, ValueError where the file holds no genotype.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "genotype.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        try:
            return from_json(text) if text.lstrip().startswith("{") else from_text(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    known = published()
    if str(source) in known:
        return known[str(source)]
    near = difflib.get_close_matches(str(source).upper(), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; published names: {', '.join(known)}"
    raise FileNotFoundError(f"no genotype at {source!r}, neither a file nor a finished search run{hint}")
