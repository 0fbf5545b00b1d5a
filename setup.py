"""Everything that packaging needs is read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LICENSES = {"apache2": "Apache-2.0"}

parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
readme = HERE / "README.md"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=LICENSES[settings["license"]],
    keywords=settings["keywords"],
    packages=find_packages(include=[settings["lib_name"], settings["lib_name"] + ".*"]),
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
