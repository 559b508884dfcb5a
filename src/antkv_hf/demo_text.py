"""The text that the demo reads: about 2,300 tokens, written for it."""

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
radio switched on, fill the lanterns, and make tea. Most storms are over by the morning.

8. Winter. From December to February the path to the pier is strewn with sand every morning, because the stones are \
covered with ice. The stove in the kitchen burns day and night; the other rooms are heated only in the evening. One \
basket of wood lasts for about five hours. The wood is stacked behind the engine room, the oldest pieces in front. If \
the pipes freeze, warm them slowly with wet cloths and never with a flame. The water for the cat is kept next to the \
stove. In the long nights the keepers play chess, and the winner of the winter is allowed to choose the colour of the \
boat in the spring. It has been green for six years now, since nobody has been able to beat the cook.

9. Radio and letters. The radio stands on the desk in the office. Every day at seven in the morning and at seven in \
the evening the keeper on duty reports the weather to the coast guard: wind, sight, waves and pressure, in this order. \
The report takes less than two minutes. Private calls are possible on Wednesday after eight o'clock. If the radio is \
silent for more than a day, hoist the yellow flag on the mast, and the fishermen will carry the news to Harrow. The \
post office of Harrow keeps parcels for three weeks. Newspapers arrive all at once, and it is a custom of the house to \
read only one of them each day, in the right order, so that the news lasts until the next boat.

10. Tools and repairs. All tools hang on the wall of the workshop, each on its own hook, and the outline of every tool \
is painted on the wall in white, so that one can see what is missing. Whoever borrows a tool writes his name on the \
slate by the door. The large saw may only be used by two people. Paint for the tower is ordered in March and applied \
in May, when the walls are dry. The white paint needs two coats, the red paint on the gallery needs three. Ropes are \
checked on the first Monday of each month, and a rope that has been repaired twice is not used on the boat any more.

11. The engine. The diesel engine turns the dynamo and the pump. It was made in Bremen and has run since 1967. It is \
started with compressed air, and the pressure must be at least twelve bar before the valve is opened. The oil is \
changed every two hundred hours. If the engine knocks, stop it and call Ines Calder, whatever the time. The tank holds \
1,500 litres, and the level is read on Friday. A second, smaller engine stands in the shed and is good enough for the \
lamp alone. Ear protection hangs to the left of the door.

12. Health. The medicine chest is in the office, on the upper shelf, and the key hangs under the clock. Burns are \
cooled with water for fifteen minutes. For every accident, also a small one, a page is written in the grey book. The \
doctor of Harrow, whose name is Simon Aldous, can be reached by radio at any time. If somebody has to be carried off \
the island, the helicopter lands on the meadow south of the house; the sheep must be driven behind the wall before \
it comes, and the laundry must be taken in.

13. The garden and the sheep. Behind the south wall there is a garden with potatoes, beans, onions and a pear tree, \
which was planted by the first keeper. Seaweed is brought up from the beach in autumn and dug into the ground. There \
are eleven sheep on the meadow. They are shorn in June, and the wool is sold in Harrow to a weaver called Agnes Roth, \
who makes blankets of it. Each new keeper is given one of these blankets on the first evening, together with a lantern \
and this handbook."""


QUESTIONS = (
    "How must the glass of the lens be cleaned?",
    "What is the name of the cat?",
    "Who built the lighthouse?",
    "What is the name of the supply boat?",
)
