"""Where the steps of a chain begin and end, where the data set does not say so itself."""
