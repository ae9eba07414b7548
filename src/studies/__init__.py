"""Studies: rows of configurations under several seeds, and what their differences say."""

from src.studies.ablation import ABLATION
from src.studies.transfer import TRANSFER

STUDIES = {study.name: study for study in (ABLATION, TRANSFER)}
