"""Networks that metrics see pictures with: the theatre's readers, and the user's own weights from disk."""
