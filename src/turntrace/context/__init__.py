"""What the model is given: counting its tokens."""

from turntrace.context.encodings import count_text, encoding, encoding_for_model

__all__ = ["count_text", "encoding", "encoding_for_model"]
