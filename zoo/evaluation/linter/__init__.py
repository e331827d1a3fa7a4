"""The linter: checks that a robustness number is not an artefact of the attack."""
