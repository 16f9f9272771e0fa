"""Reports as pictures and self-contained pages, and the article's numbers to compare with."""
