"""What pe_fx raises and warns with."""


class PeFxError(Exception):
    """Every error of pe_fx; its text names the weights and shapes and says what to do."""


class CaptureError(PeFxError):
    """The model's graph could not be captured with the inputs given or derived."""


class NoSitesWarning(UserWarning):
    """Nothing in the model could be tied, so it was left as it is."""
