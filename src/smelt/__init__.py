"""smelt compresses trained neural networks and measures the written file, loaded again.

    result = smelt.compress(model, "recipe.yaml", smelt.Job(data=data))
    result.save("model.smelt")
    model = smelt.load("model.smelt", into=MyModel())

What is exported here is public; everything else may move.
"""

from smelt.bench import bench as bench
from smelt.compress import Result as Result
from smelt.compress import compress as compress
from smelt.core.data import Batches as Batches
from smelt.core.data import Data as Data
from smelt.core.data import Guided as Guided
from smelt.core.edit import Edit as Edit
from smelt.core.encoded import Encoded as Encoded
from smelt.core.encoded import Form as Form
from smelt.core.errors import SmeltError as SmeltError
from smelt.core.export import export as export
from smelt.core.job import Job as Job
from smelt.core.method import Codec as Codec
from smelt.core.method import Lossless as Lossless
from smelt.core.method import Method as Method
from smelt.core.method import Objective as Objective
from smelt.core.method import Rewrite as Rewrite
from smelt.core.method import Seen as Seen
from smelt.core.method import State as State
from smelt.core.method import Stats as Stats
from smelt.core.method import Values as Values
from smelt.core.method import make as make
from smelt.core.recipe import Recipe as Recipe
from smelt.core.report import Report as Report
from smelt.core.settings import Ramp as Ramp
from smelt.core.settings import setting as setting
from smelt.core.shelf import register as register
from smelt.core.source import Source as Source
from smelt.data._read import open_data as open_data
from smelt.formats._open import load_file as load_file
from smelt.formats._open import open as open
from smelt.formats._tensors import save_file as save_file
from smelt.formats.pack import pack as pack
from smelt.formats.pack import unpack as unpack
from smelt.formats.smelt import load as load
from smelt.formats.smelt import save as save
from smelt.formats.torch import load_fast as load_fast
from smelt.kernels._fast import fast as fast
from smelt.models._open import open_model as open_model
from smelt.sensitivity import sensitivity as sensitivity
from smelt.train.training import training as training
from smelt.version import __version__ as __version__
