"""Optional packages, imported where they are used."""

import importlib
from typing import Any

# Packages that are imported under another name than they are installed by.
_PACKAGES = {"sklearn": "scikit-learn", "vl_convert": "vl-convert-python"}


def require(module: str, extra: str) -> Any:
    """Imports a module of an optional package.

    Args:
        module: Its name, such as ``"rich.table"``.
        extra: The extra of this package that installs it.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: The package is not installed. The message names the extra.

    Example:
        >>> require("jaxopt_missing", extra="cli")
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: this needs jaxopt_missing: pip install 'jaxopt-compress[cli]'
    """
    root = module.split(".")[0]
    try:
        importlib.import_module(root)
    except ModuleNotFoundError as error:
        if error.name != root:
            raise  # The package is there, but something that it needs is not.
        package = _PACKAGES.get(root, root)
        message = f"this needs {package}: pip install 'jaxopt-compress[{extra}]'"
        raise ModuleNotFoundError(message, name=root) from error
    return importlib.import_module(module)
