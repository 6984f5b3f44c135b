"""Least times of the operations in a compiled program, from the text of the program.

An operation takes at least what its products need at the machine's peak, and at least what its
operands and results need at the bandwidth of memory (the roofline model). Data that caches keep
between operations may be faster than that.
"""

import math
import re
from typing import NamedTuple

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8, 'f64': 8}


class Operation(NamedTuple):
    """One line of a program's text."""

    kind: str
    shapes: list[tuple[str, tuple[int, ...]]]  # types and shapes of its results
    operands: list[str]
    line: str

    @property
    def size(self) -> int:
        """Bytes of its results."""
        return sum(BYTES.get(kind, 4) * math.prod(shape) for kind, shape in self.shapes)


class Cost(NamedTuple):
    """What an operation has to do."""

    flops: int
    size: int  # bytes read and written
    where: str  # the function that it comes from


def costs(program: str) -> dict[str, Cost]:
    """Costs of all operations in the text of a compiled program, by name."""
    computations = _parse(program)
    everything = {name: op for inside in computations.values() for name, op in inside.items()}
    result = {}
    for name, operation in everything.items():
        named = re.search(r'op_name="([^"]*)"', operation.line)
        called = re.search(r'(?:calls|to_apply)=%?([\w.\-]+)', operation.line)
        inside = computations.get(called[1], {}) if called else {}
        flops = sum(_flops(op, everything) for op in (operation, *inside.values()))
        size = _size(operation, inside, everything)
        result[name] = Cost(flops, size, named[1] if named else '')
    return result


def _parse(program: str) -> dict[str, dict[str, Operation]]:
    """Operations by name, by the computation that they belong to."""
    computations: dict[str, dict[str, Operation]] = {}
    for line in program.splitlines():
        if found := re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line):
            inside = computations.setdefault(found[1], {})
        elif found := re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(', line):
            shapes = [
                (kind, tuple(map(int, filter(None, shape.split(',')))))
                for kind, shape in re.findall(r'(\w+)\[([\d,]*)\]', found[2])
            ]
            arguments = line[found.end() :].split(')', 1)[0]
            operands = re.findall(r'%([\w.\-]+)', arguments)
            inside[found[1]] = Operation(found[3], shapes, operands, line)
    return computations


def _flops(operation: Operation, everything: dict[str, Operation]) -> int:
    """Of a matrix product or a convolution, a multiply-add being two; none of anything else."""
    line, inner = operation.line, 0
    if operation.kind == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line)
        left = everything[operation.operands[0]].shapes[0][1]
        inner = math.prod(left[int(axis)] for axis in contracted[1].split(',')) if contracted else 1
    elif operation.kind == 'convolution' and (labels := re.search(r'_(\w+)->', line)):
        kernel = everything[operation.operands[1]].shapes[0][1]
        inner = math.prod(kernel) // kernel[labels[1].index('o')]
    return 2 * inner * math.prod(operation.shapes[0][1])


def _size(
    operation: Operation, inside: dict[str, Operation], everything: dict[str, Operation]
) -> int:
    """Bytes read and written. Of an array of which a part is read or replaced, only that part."""
    if not inside:
        return operation.size + sum(everything[name].size for name in operation.operands)
    written = operation.size
    read = 0
    for name, argument in inside.items():
        if argument.kind != 'parameter':
            continue
        users = [user for user in inside.values() if name in user.operands]
        replacing = [user for user in users if user.kind == 'dynamic-update-slice']
        if all(user.kind == 'dynamic-slice' for user in users):
            read += sum(user.size for user in users)
        elif replacing and replacing[0].operands[0] == name:
            written -= argument.size - everything[replacing[0].operands[1]].size
        else:
            read += argument.size
    return read + max(written, 0)
