"Package metadata lives in `settings.ini`; nbdev and setuptools read the same file."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
def words(key): return cfg.get(key, '').split()

extra_names = [key.removesuffix('_requirements') for key in cfg if key.endswith('_requirements')]
readme = root/'README.md'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    author=cfg['author'], license='Apache-2.0', license_files=['LICENSE'], keywords=words('keywords'),
    python_requires=f">={cfg['min_python']}", install_requires=words('requirements'),
    extras_require={name: words(f'{name}_requirements') for name in extra_names},
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), include_package_data=True,
    # Said aloud, it puts this folder on the path of an editable install, so that nbdev finds tools/docs.py.
    package_dir={'': '.'},
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
