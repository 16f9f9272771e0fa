"""What a recipe costs on hardware that is not here: the real compilers are asked, no weight is allocated."""
