"""The description for package indexes; pyproject.toml holds all other metadata."""

import re
from pathlib import Path

from setuptools import setup

text = Path(__file__).with_name('README.md').read_text(encoding='utf-8')
# An index has no files of the repository: drop pictures of it, and keep the text of links to it.
text = re.sub(r'!\[[^]]*\]\((?!https?:)[^)]*\)\n*', '', text)
text = re.sub(r'\[([^]]*)\]\((?!https?:|#)[^)]*\)', r'\1', text)
setup(long_description=text, long_description_content_type='text/markdown')
