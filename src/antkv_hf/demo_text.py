"""The text that the demo reads: about 1,050 tokens, written for it."""

HANDBOOK = """\
Handbook of the Saltmarsh Lighthouse, for new keepers

1. The house and the people. The Saltmarsh Lighthouse stands on the northern tip of Gull Island, two miles from the \
village of Harrow. It was built in 1874 by the engineer Maria Lindqvist, who also designed the stone bridge over the \
river Tamsin. The tower is 41 metres high and has 216 steps. The head keeper is Oskar Brandt. He is responsible for \
the lamp and for the logbook. His deputy, Ines Calder, looks after the engine room and the supply boat. The cook is \
called Peter Moll, and he does not like to be asked what is for dinner. There is also a cat, whose name is Admiral. \
The cat sleeps in the lamp room in winter and in the boat house in summer, and nobody is allowed to move her.

2. The lamp. The lamp is lit every evening thirty minutes before sunset and put out thirty minutes after sunrise. It \
gives two white flashes every fifteen seconds, followed by a pause. In clear weather the light can be seen from a \
distance of 22 miles. The glass of the lens must be cleaned every Monday with warm water and vinegar. Never use soap, \
because soap leaves a film that scatters the light. If the main lamp fails, switch on the emergency lamp in the green \
cupboard on the third floor. The emergency lamp runs for nine hours on one battery. Two spare batteries are kept under \
the stairs. Write every failure down in the logbook, with the time, the weather and the name of the keeper on duty.

3. Fog. When the harbour wall cannot be seen from the balcony, start the fog horn. The horn sounds once every forty \
seconds. It takes six minutes to build up pressure, so do not wait until the fog has arrived. Ships that hear the horn \
may answer on radio channel 12. Answer them with the name of the lighthouse, the direction of the wind and the depth \
of the water at the pier. The depth is shown on the blue gauge next to the door of the engine room. In the great fog \
of 1931 the horn sounded for 57 hours without a pause, and the keepers took turns to sleep in the kitchen, which was \
the only room that was quiet enough.

4. Supplies. The supply boat is called Marigold. She comes every second Thursday with food, letters, lamp oil and \
diesel for the engine. In a storm she waits in Harrow until the wind is weaker than force six. The store room must \
always hold food for twenty days. Bread is baked on Tuesday and Saturday. Drinking water comes from the cistern behind \
the house, which holds 8,000 litres of rain water. The water has to be boiled for three minutes before it is drunk. If \
the cistern is less than a quarter full, tell Ines Calder, who will order water from the village. Letters that are to \
leave with the boat belong in the red box by the front door before eight o'clock in the morning.

5. Visitors. Visitors may climb the tower on Sunday between one and four o'clock in the afternoon. A ticket costs \
three crowns, and children under ten years climb for free. No more than twelve people may stand on the balcony at the \
same time. Visitors must not touch the lens, feed the cat or ring the bell. The bell is only rung when somebody is \
missing. If a visitor feels dizzy on the stairs, there is a bench on the second floor, and a bottle of water beside \
it. The money from the tickets is counted in the evening and put into the iron box in the office. In the year 1998 it \
paid for a new roof.

6. Birds. Gull Island is home to about four hundred pairs of terns and to a small colony of seals on the western \
beach. From April to July the western beach is closed, so that the birds can breed in peace. The warden of the reserve \
is Doctor Hanna Weiss. She visits the island on the first day of every month and counts the nests. Birds that have \
flown against the glass are put into the wooden box in the boat house, where it is dark and calm; most of them can fly \
again after an hour. Please write the kind of bird into the brown notebook.

7. Storms. When the barometer falls below 980, close the shutters on the west side first, then bring the boat into \
the boat house and tie down everything on the pier. Nobody leaves the house alone in a storm. The highest wave that \
was ever seen here reached the kitchen window, nine metres above the sea, in the night of 3 February 1953. Keep the \
radio switched on, fill the lanterns, and make tea. Most storms are over by the morning."""


QUESTIONS = (
    "How must the glass of the lens be cleaned?",
    "What is the name of the cat?",
    "Who is the warden of the reserve?",
    "What is the name of the supply boat?",
)
