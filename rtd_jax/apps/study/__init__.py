"""Methods x seeds x tasks: runs side by side, and what can be concluded from them."""
