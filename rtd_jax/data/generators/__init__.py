"""Problems made on the spot, each kind in a module of its own."""
