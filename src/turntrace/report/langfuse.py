"""Where a session is in Langfuse."""

from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from turntrace.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class LangfusePlace:
    """A project of a Langfuse.

    Attributes:
        base_url: Address of the server, as ``LANGFUSE_BASE_URL`` says it.
        project_id: Id of the project.

    Raises:
        ConfigurationError: If the address is not one of http or https.
    """

    base_url: str
    project_id: str

    def __post_init__(self) -> None:
        if not _is_page(self.base_url):
            raise ConfigurationError(
                f"LANGFUSE_BASE_URL is {self.base_url!r:.80}, which is no address of a page. Allowed is one of http or "
                "https, as https://cloud.langfuse.com."
            )

    def session_url(self, session_id: str) -> str:
        """Return the address of a session's page."""
        project = quote(self.project_id, safe="")
        return f"{self.base_url.rstrip('/')}/project/{project}/sessions/{quote(session_id, safe='')}"


def _is_page(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)
