"Everything this package says of itself stands in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = here / "README.md"
extras = {name: cfg[f"{name}_requirements"].split() for name in ("hub", "track", "cuda", "compression", "peers", "hf", "dev")}
extras["cuda"] = [f'{r}; sys_platform != "darwin"' for r in extras["cuda"]]
extras["dev"] += extras["hub"] + extras["track"] + extras["compression"]  # the notebooks show them
extras["all"] = sorted({r for needs in extras.values() for r in needs})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["py.typed"]},
    data_files=[(f"share/{cfg['lib_name']}/outside", ["tests/outside/bk_outside.py", "tests/outside/pyproject.toml"])],  # page 17 reads it
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": [line.strip() for line in cfg["console_scripts"].splitlines() if line.strip()],
        "resnet_bk.kernels": [line.strip() for line in cfg["kernels"].splitlines() if line.strip()],
        "resnet_bk.parts": [line.strip() for line in cfg["parts"].splitlines() if line.strip()],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    zip_safe=False,
)
