"""Everything rt-neds raises on purpose, named for who must act.

    RtNedsError
    ├── ConfigError     whoever wrote the TOML or the command line
    ├── SessionError    whoever made the session file
    ├── BundleError     whoever trained or copied the bundle
    ├── DetectorError   whoever made the detector, or gives it samples
    ├── StreamError     whoever set up the sockets and the acquisition
    │   └── WireError   whoever sent these bytes (counted and skipped in the hot path)
    └── DeviceError     whoever owns this machine

A message is one line and says three things: what came, what was expected, what to do.
"""


class RtNedsError(Exception):
    """Root of every error a user can cause or mend; the command line prints it without traceback.

    Attributes
    ----------
    exit_code : int
        2 for unusable input, 1 for work that was begun and failed.
    """

    exit_code = 2


class ConfigError(RtNedsError):
    """A configuration file or a command-line option that cannot be used."""


class SessionError(RtNedsError):
    """A session file that cannot be read or lacks what was asked of it."""


class BundleError(RtNedsError):
    """A bundle that is damaged, of another kind, or does not fit the session."""


class DetectorError(RtNedsError):
    """A detector that is damaged, of another kind, or does not fit the probe."""


class StreamError(RtNedsError):
    """A socket that cannot be used or a stream that does not fit the bundle."""


class WireError(StreamError):
    """One message that breaks the wire protocol."""


class DeviceError(RtNedsError):
    """A device that is missing, too small, or failed."""

    exit_code = 1
