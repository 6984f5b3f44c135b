"""The text of a compiled program, and what it says of exchanges between devices."""

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)')
_ARRAY = re.compile(r'\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|computations?)=(\{[^}]*\}|%?[\w.\-]+)')
_BITS = {'pred': 8}  # of others the number is in their name


class Collective(NamedTuple):
    """One exchange between devices."""

    kind: str
    bytes: int  # of the whole array on one device: the result, or what is scattered
    times: int  # in one run of the program


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r'%([\w.\-]+)', self.rest.partition(')')[0])


def collectives(text: str) -> list[Collective]:
    """Returns the exchanges of a compiled program.

    One that a scheduler has spread over several operations, which share its channel, counts once;
    one in a loop as often as the loop runs.

    Args:
      text: what `compiled.as_text()` returns.

    Raises:
      ValueError: an exchange in a loop of unknown length.
    """
    computations, entry = parse(text)
    shapes = {x.name: x.shape for instructions in computations.values() for x in instructions}
    found: dict[str, Collective] = {}
    for name, times in runs(computations, entry):
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix('-done')
            if kind not in KINDS:
                continue
            size = array_bytes(instruction.shape)
            if kind == 'reduce-scatter' and not instruction.opcode.endswith('-done'):
                size = sum(array_bytes(shapes[operand]) for operand in instruction.operands)
            channel = re.search(r'channel_id=(\d+)', instruction.rest)
            key = f'{kind} {channel[1]}' if channel else instruction.name
            if times is None:
                raise ValueError(f'How often does the loop with {instruction.name} run?')
            found[key] = Collective(kind, size, times)
    return list(found.values())


def array_bytes(shape: str) -> int:
    """Bytes of an array, or of all in a tuple, by its type in a program: `bf16[2,3]{1,0}`."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        elements = 1
        for size in filter(None, sizes.split(',')):
            elements *= int(size)
        bits = _BITS.get(dtype) or int(re.sub(r'\D', '', dtype) or 0)
        total += elements * bits // 8
    return total


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of every computation, and the name of the first one to run."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ''
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            entry = name if match[1] else entry
            computations[name] = []
        elif name and (match := _INSTRUCTION.match(line)):
            computations[name].append(Instruction(*match.groups()))
    return computations, entry


def runs(
    computations: dict[str, list[Instruction]], entry: str
) -> Iterator[tuple[str, int | None]]:
    """Yields each computation that runs, with how often; None where nobody knows."""
    todo: list[tuple[str, int | None]] = [(entry, 1)]
    seen = set()
    while todo:
        name, times = todo.pop()
        if (name, times) in seen:
            continue
        seen.add((name, times))
        yield name, times
        for instruction in computations[name]:
            called = [
                callee
                for group in _CALLED.findall(instruction.rest)
                for callee in re.findall(r'[\w.\-]+', group)
                if callee in computations
            ]
            inner = times
            if instruction.opcode == 'while':
                length = _trip_count(instruction, computations)
                inner = None if times is None or length is None else times * length
            todo += [(callee, inner) for callee in called]


def _trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often a loop runs whose condition compares a counter, from 0, with one constant."""
    if known := re.search(r'known_trip_count[^\d]*(\d+)', loop.rest):
        return int(known[1])
    condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)
    instructions = computations.get(condition[1], []) if condition else []
    constants = [int(x.rest.split(')')[0]) for x in instructions if x.opcode == 'constant']
    compared = any('direction=LT' in x.rest for x in instructions)
    return constants[0] if len(constants) == 1 and compared else None
