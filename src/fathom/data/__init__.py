"""Real text as token ids: tokenizers, prepared corpora, and a stream that resumes to the token."""
