"""Least times of the operations in a compiled program, from the text of the program.

An operation takes at least what its products need at the machine's peak, and at least what its
operands and results need at the bandwidth of memory (the roofline model). Data that caches keep
between operations may be faster than that.
"""

import math
import re
from typing import NamedTuple

from dreamerv3_jax import program
from dreamerv3_jax.program import Instruction, array_bytes


class Cost(NamedTuple):
    """What an operation has to do."""

    flops: int
    size: int  # bytes read and written
    where: str  # the function that it comes from


def costs(text: str) -> dict[str, Cost]:
    """Costs of all operations in the text of a compiled program, by name."""
    computations, _ = program.parse(text)
    everything = {x.name: x for instructions in computations.values() for x in instructions}
    result = {}
    for name, instruction in everything.items():
        named = re.search(r'op_name="([^"]*)"', instruction.rest)
        called = re.search(r'(?:calls|to_apply)=%?([\w.\-]+)', instruction.rest)
        inside = computations.get(called[1], []) if called else []
        flops = sum(_flops(x, everything) for x in (instruction, *inside))
        size = _size(instruction, inside, everything)
        result[name] = Cost(flops, size, named[1] if named else '')
    return result


def _dimensions(instruction: Instruction) -> list[int]:
    found = re.search(r'\[([\d,]*)\]', instruction.shape)
    return [int(size) for size in filter(None, found[1].split(','))] if found else []


def _flops(instruction: Instruction, everything: dict[str, Instruction]) -> int:
    """Of a matrix product or a convolution, a multiply-add being two; none of anything else."""
    rest, inner = instruction.rest, 0
    if instruction.opcode == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]+)\}', rest)
        left = _dimensions(everything[instruction.operands[0]])
        inner = math.prod(left[int(axis)] for axis in contracted[1].split(',')) if contracted else 1
    elif instruction.opcode == 'convolution' and (labels := re.search(r'_(\w+)->', rest)):
        kernel = _dimensions(everything[instruction.operands[1]])
        inner = math.prod(kernel) // kernel[labels[1].index('o')]
    return 2 * inner * math.prod(_dimensions(instruction))


def _size(
    instruction: Instruction, inside: list[Instruction], everything: dict[str, Instruction]
) -> int:
    """Bytes read and written. Of an array of which a part is read or replaced, only that part."""

    def size(name: str) -> int:
        return array_bytes(everything[name].shape)

    written = size(instruction.name)
    if not inside:
        return written + sum(map(size, instruction.operands))
    read = 0
    for argument in inside:
        if argument.opcode != 'parameter':
            continue
        users = [user for user in inside if argument.name in user.operands]
        replacing = [user for user in users if user.opcode == 'dynamic-update-slice']
        parts = [user for user in users if user.opcode in ('slice', 'dynamic-slice')]
        if len(parts) == len(users) and all(x.operands[0] == argument.name for x in parts):
            read += sum(size(part.name) for part in parts)
        elif replacing and replacing[0].operands[0] == argument.name:
            written -= size(argument.name) - size(replacing[0].operands[1])
        else:
            read += size(argument.name)
    return read + max(written, 0)
