"""The named errors and warnings of the package.

Every message says what was expected, what came, and what to do. The errors also derive from the
built-in class that fits, so that ``except ValueError`` works in code that knows nothing of this
package.
"""

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "CollapseWarning",
    "ContextError",
    "DeviceError",
    "DtypeError",
    "ForwardModeError",
    "InjectiveFlowError",
    "NonFiniteError",
    "NotInjectiveError",
    "NumericalWarning",
    "OffManifoldError",
    "OptionError",
    "ParamStoreWarning",
    "ReducedLayerWarning",
    "RegistrationError",
    "ScaleWarning",
    "ShapeError",
    "SmoothnessWarning",
    "StackingWarning",
    "UnsupportedLayerError",
    "UnsupportedModelError",
]


class InjectiveFlowError(Exception):
    """Base class of every error that this package raises on purpose."""


class ShapeError(InjectiveFlowError, ValueError):
    """A tensor, base distribution or layer has the wrong shape."""


class DtypeError(InjectiveFlowError, TypeError):
    """A tensor has another dtype than the model computes in."""


class DeviceError(InjectiveFlowError, RuntimeError):
    """A tensor is on another device than the model."""


class ContextError(InjectiveFlowError, ValueError):
    """A context is missing, superfluous, or of another length than the batch."""


class NonFiniteError(InjectiveFlowError, ValueError):
    """A tensor contains NaN or infinity."""


class OptionError(InjectiveFlowError, ValueError):
    """An option is unknown or outside its range."""


class NotInjectiveError(InjectiveFlowError, ValueError):
    """A map that must raise the dimension does not, or a stack contains no such map."""


class UnsupportedLayerError(InjectiveFlowError, TypeError):
    """A layer would make the density or its gradient silently wrong at this place."""


class ForwardModeError(UnsupportedLayerError, RuntimeError):
    """A forward-mode derivative was requested where only reverse mode is known to be right."""


class UnsupportedModelError(InjectiveFlowError, NotImplementedError):
    """A model, or a site of a Pyro model, is used in a way that has no right answer here."""


class OffManifoldError(InjectiveFlowError, ValueError):
    """A requested quantity needs a density on the manifold, or a point on it."""


class CheckpointError(InjectiveFlowError, RuntimeError):
    """A file is no checkpoint, is damaged, or belongs to another model."""


class RegistrationError(InjectiveFlowError, RuntimeError):
    """A name is already taken in normflows, or in Pyro's parameter store."""


class NumericalWarning(RuntimeWarning):
    """A result was computed, but it has lost most or all of its digits."""


class CollapseWarning(UserWarning):
    """Training buys likelihood with the learned manifold, or is about to."""


class ScaleWarning(UserWarning):
    """Columns of the data have very different scales, and training sees only the largest."""


class SmoothnessWarning(UserWarning):
    """A network is piecewise linear, and the surrogate learns curvature by second derivatives."""


class StackingWarning(UserWarning):
    """An injection seems to be used wrongly in a container of normflows."""


class ParamStoreWarning(UserWarning):
    """Parameters came back from Pyro's parameter store, but the buffers beside them did not."""


class CheckpointWarning(UserWarning):
    """A file was loaded into a model that is trained or evaluated by other options."""


class ReducedLayerWarning(UserWarning):
    """A layer was built with sizes at which it is a simpler one."""


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
