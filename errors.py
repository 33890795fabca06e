"""Every error that pared raises on purpose, in one tree.

Each message says what is wrong, where, and what to do next. Catch `ParedError` to catch them all;
the branches follow the way of a model: source, folder, kernels, requests.
"""

from __future__ import annotations


class ParedError(Exception):
    """The root of every error that pared raises on purpose."""


# --- reading somebody else's checkpoint -------------------------------------------------------


class SourceError(ParedError):
    """A checkpoint to convert is not there, not whole, or not of a kind that pared reads."""


class UnsupportedModel(SourceError):
    """The model's family, or one of its switches, is not one that pared can run exactly."""


# --- the compact folder ----------------------------------------------------------------------


class FolderError(ParedError):
    """A compact folder cannot be read or written."""


class FolderExists(FolderError):
    """The target folder is already there and `--overwrite` was not given."""


class FolderBusy(FolderError):
    """Another process is converting into the same target."""


class FolderDamaged(FolderError):
    """A file of the folder is truncated, unreadable, or not what the index or manifest promises."""


class UnknownVersion(FolderError):
    """The folder was written by a newer pared than this one."""


class MissingTensors(FolderError):
    """Tensors that the manifest or the model needs are not in the folder."""


class LeftoverTensors(FolderError):
    """The folder holds tensors that nothing in the model uses."""


class WrongShape(FolderError):
    """A tensor's shape or dtype is not the one that the manifest promises."""


class BadWeights(FolderError):
    """A weight holds NaN or infinity."""


class DiskFull(FolderError):
    """The disk filled up while writing; what was finished is kept and the conversion can resume."""


# --- kernels -----------------------------------------------------------------------------------


class KernelError(ParedError):
    """A kernel cannot run here, or was asked for something that it cannot do."""


class FallbackRefused(KernelError):
    """`strict` was asked for and a slower path would have run instead of the intended kernel."""


# --- requests to a running model ---------------------------------------------------------------


class RequestError(ParedError, ValueError):
    """A request cannot be served as it was asked."""


class PromptTooLong(RequestError):
    """The prompt does not fit into the model's context or into the KV cache."""


class EmptyPrompt(RequestError):
    """The prompt holds no token."""


class BadParameter(RequestError):
    """A sampling parameter or an option is out of its range or unknown."""


class EngineError(ParedError):
    """The engine cannot go on; the message names the step that failed."""


class EngineBusy(EngineError):
    """As many requests wait as may wait; the same one can be asked again later."""


class EngineStopped(EngineError):
    """The engine takes no more requests: it is about to end, or it has died."""


# --- servers that pared asks --------------------------------------------------------------------


class EndpointError(ParedError):
    """A server is not there, refuses what it is asked, or breaks off."""
