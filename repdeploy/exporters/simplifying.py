"""onnxsim, held to the same gates as everything else: what it makes is judged again, and the original stays where it fails."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings

import onnx

from repdeploy.errors import BackendFailed, BackendMissing, words

HINT = "pip install repdeploy[simplify]"


def require() -> None:
    """Raises BackendMissing."""
    if importlib.util.find_spec("onnxsim") is None:
        raise BackendMissing("--simplify: onnxsim is not installed", hint=HINT)


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxsim makes of a graph, without what it writes about itself. Raises BackendFailed with what it said."""
    import onnxsim

    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            found, fine = onnxsim.simplify(model)
    except Exception as reason:  # it raises whatever its many parts raise
        raise BackendFailed(f"onnxsim failed: {words(reason, 200)}") from reason
    if not fine:
        raise BackendFailed("onnxsim could not confirm its own result")
    kept = [item for item in found.metadata_props if not item.key.startswith("onnxsim.")]
    del found.metadata_props[:]
    found.metadata_props.extend(kept)
    result: onnx.ModelProto = found
    return result
