"""The types that meet in the products of a compiled program."""

import re

# A definition, with the name of its type where it is an array: `%x = s8[8,64]{1,0} fusion(...`.
_DEFINITION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ([a-z]+[0-9]*[a-z0-9]*)\[")
# A product that the compiler generates, or one of a library.
_PRODUCT = re.compile(r" = .*? (dot|convolution|custom-call)\((.*?)\)(.*)$")
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)')
_OPERAND = re.compile(r"%([\w.\-]+)")


def dot_types(hlo_text):
    """Counts the products of an optimized program by the types of their operands.

    Looks into fusions too, where most products are; the body of a loop counts once. A conversion in
    front of a product shows as the type that it converts to, as the product is what units execute.
    The inside of hand-written kernels is not in this text.

    Args:
      hlo_text: `compiled.as_text()`.

    Returns:
      A dict from operand types, such as `"s8 x s4"`, to the number of such products.

    Example:
      >>> hlo = '''%fused (p: s8[8,64], w: s4[64,32]) -> s32[8,32] {
      ...   %p = s8[8,64]{1,0} parameter(0)
      ...   %w = s4[64,32]{1,0:E(4)} parameter(1)
      ...   ROOT %dot.1 = s32[8,32]{1,0} dot(%p, %w), lhs_contracting_dims={1}
      ... }'''
      >>> dot_types(hlo)
      {'s8 x s4': 1}
    """
    found, types = {}, {}
    for line in hlo_text.splitlines():
        if line.endswith("{"):
            types = {}  # Names are unique within a computation.
        definition = _DEFINITION.match(line)
        if definition:
            types[definition[1]] = definition[2]
        product = _PRODUCT.search(line)
        if product and (product[1] != "custom-call" or _LIBRARY.search(product[3])):
            operands = [types.get(name, "?") for name in _OPERAND.findall(product[2])[:2]]
            key = " x ".join(operands)
            found[key] = found.get(key, 0) + 1
    return found
