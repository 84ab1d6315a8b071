"""The commands: `main` finds them, one file a verb. `stage` builds the embedded world that `demo` plays in."""
