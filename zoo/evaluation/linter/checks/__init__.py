"""The checks of the linter, by what they look at; `zoo.evaluation.linter.lint` has their order."""
