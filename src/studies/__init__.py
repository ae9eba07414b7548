"""Studies: rows of configurations under several seeds, and what their differences say."""

from src.studies.ablation import ABLATION
from src.studies.animals import ANIMALS
from src.studies.dogs import DOGS
from src.studies.fine_grained import FINE_GRAINED
from src.studies.transfer import TRANSFER

STUDIES = {study.name: study for study in (ABLATION, TRANSFER, ANIMALS, DOGS, FINE_GRAINED)}
