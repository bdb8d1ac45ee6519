"""What is not code comes along with the package, wherever it was imported from."""

from importlib import metadata, resources

import pytest

import dir_toolkit


@pytest.mark.parametrize("name", ["py.typed", "experiment/results/report.html.jinja"])
def test_the_package_holds_its_files(name: str) -> None:
    assert resources.files(dir_toolkit).joinpath(name).is_file()


def test_the_distribution_has_the_version_of_the_package() -> None:
    assert metadata.version("dir_toolkit") == dir_toolkit.__version__
