"""What the tests of every package share."""

pytest_plugins = ["simulated_accelerator.pytest_plugin"]
