"""Hugging Face's names of the parameters.

The modules carry Hugging Face's attribute names, so a tensor's name is its path; only the L layers,
one array here and L tensors there, are stacked and unstacked on the way.
"""

from typing import Any

HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"


def tensor_names(path: tuple[Any, ...], num_layers: int) -> list[str]:
    """The names of one parameter: L of them for a parameter of the stacked layers."""
    match path:
        case ("backbone", "lm_head"):
            return [HEAD]
        case ("backbone", "embed_tokens"):
            return [TABLE]
        case ("backbone", "layers", *rest):
            suffix = ".".join(map(str, rest))
            return [f"model.layers.{i}.{suffix}" for i in range(num_layers)]
        case ("critic", *rest):
            return ["critic." + name for name in tensor_names(("backbone", *rest), num_layers)]
        case ("backbone", *rest):
            return ["model." + ".".join(map(str, rest))]
        case _:
            return [".".join(map(str, path))]
