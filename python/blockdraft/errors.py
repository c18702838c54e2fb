"""What blockdraft raises for bad input. Operators raise RuntimeError, as torch's do."""


class BlockdraftError(Exception):
    """Base of the package's own errors."""


class ConfigError(BlockdraftError, ValueError):
    """A config.json that does not describe a model this package runs: file, key, what was wanted, what came."""


class CheckpointError(BlockdraftError, ValueError):
    """Weights that cannot be loaded: file, tensor, reason."""


class RequestError(BlockdraftError, ValueError):
    """A prompt or a sampling parameter that cannot be served."""
