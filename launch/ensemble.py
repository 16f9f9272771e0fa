"""Distills several students that differ in their seed alone, as one program. Run it again to resume."""

from entry import run

if __name__ == "__main__":
    run("ensemble")
