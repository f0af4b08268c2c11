"""Every error the engine raises on purpose: one sentence that names the thing and the way out."""


class EngineError(Exception):
    """Base of all engine errors; its text is meant for the user as it stands."""


class ConfigError(EngineError):
    """A setting is out of range or contradicts another."""


class ModelFileError(EngineError):
    """A model file is corrupt, truncated, of an unknown type or of an unsupported architecture."""


class PromptTooLongError(EngineError):
    """A prompt does not fit the model's context window or the block pool."""


class GrammarError(EngineError):
    """A JSON schema cannot be compiled to a grammar."""


class OutOfMemoryError(EngineError):
    """Weights or KV blocks do not fit the device."""


class DeviceError(EngineError):
    """The wanted device is missing, or was lost in mid-run."""


class EngineClosedError(EngineError):
    """A request was submitted to a closed engine, or was pending when it closed."""


class TrainingError(EngineError):
    """Training cannot go on: its loss or its gradient is no longer a number."""
